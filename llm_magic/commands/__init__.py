"""The built-in ``%llm`` commands, one verb per file; they enter as any plugin's would."""

from __future__ import annotations

from collections.abc import Callable

from llm_magic.commands import (
    alias,
    apply,
    bench,
    chat,
    doctor,
    fix,
    load,
    log,
    machine,
    models,
    move,
    plan,
    plugins,
    ps,
    pull,
    reset,
    status,
    undo,
    unload,
    use,
)
from llm_magic.commands import (
    help as help_command,
)
from llm_magic.commands import (
    map as map_command,
)
from llm_magic.commands import (
    set as set_command,
)
from llm_magic.hookspecs import Command, hookimpl

BUILT_IN = (
    status.STATUS,
    load.LOAD,
    plan.PLAN,
    map_command.MAP,
    move.MOVE,
    apply.APPLY,
    undo.UNDO,
    ps.PS,
    use.USE,
    unload.UNLOAD,
    machine.MACHINE,
    bench.BENCH,
    models.MODELS,
    models.LIST,
    pull.PULL,
    chat.CHAT,
    reset.RESET,
    set_command.SET,
    fix.FIX,
    fix.ERROR,
    log.LOG,
    alias.ALIAS,
    plugins.PLUGINS,
    doctor.DOCTOR,
    help_command.HELP,
)


@hookimpl
def register_commands(register: Callable[[Command], None]) -> None:
    """Register the built-in commands."""
    for command in BUILT_IN:
        register(command)
