"""Where the blocks of a loaded model are, and how those that travel get to where they compute."""
