"""Live screens of notebooks: anywidget hosts of the views that ``labextension/src`` is made of."""
