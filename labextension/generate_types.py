"""Write ``src/wire.ts`` from ``llm_magic/wire.py``: ``python labextension/generate_types.py``.

A test fails while the file is older than the schema.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as schema

from llm_magic import wire

TARGET = Path(__file__).parent / "src" / "wire.ts"
_HEAD = "// Generated from llm_magic/wire.py by labextension/generate_types.py: change it there.\n"
_UNIONS = ("State", "Event", "Command")


def typescript() -> str:
    """The whole file."""
    structs = [
        value
        for value in vars(wire).values()
        if inspect.isclass(value) and issubclass(value, msgspec.Struct) and value is not msgspec.Struct
    ]
    parts = [_HEAD, *(_interface(struct) for struct in structs)]
    for name in _UNIONS:
        members = " | ".join(member.__name__ for member in getattr(wire, name).__args__)
        parts.append(f"export type {name} = {members}\n")
    return "\n".join(parts)


def _interface(struct: type[msgspec.Struct]) -> str:
    info = schema.type_info(struct)
    assert isinstance(info, schema.StructType)
    doc = " ".join((struct.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")
    lines = [f"/** {doc} */", f"export interface {struct.__name__} {{"]
    if info.tag_field:
        lines.append(f"  {info.tag_field}: '{info.tag}'")
    is_command = struct in wire.Command.__args__ or struct is wire.Placement
    for field in info.fields:
        optional = "?" if is_command and not field.required else ""
        lines.append(f"  {field.encode_name}{optional}: {_type(field.type)}")
    return "\n".join([*lines, "}\n"])


_WORDS: dict[type[schema.Type], Callable[[Any], str]] = {
    schema.StrType: lambda _: "string",
    schema.BoolType: lambda _: "boolean",
    schema.IntType: lambda _: "number",
    schema.FloatType: lambda _: "number",
    schema.NoneType: lambda _: "null",
    schema.Metadata: lambda info: _type(info.type),
    schema.LiteralType: lambda info: " | ".join(f"'{value}'" for value in info.values),
    schema.UnionType: lambda info: " | ".join(map(_type, sorted(info.types, key=_is_none))),
    schema.ListType: lambda info: _list(_type(info.item_type)),
    schema.TupleType: lambda info: f"[{', '.join(map(_type, info.item_types))}]",
    schema.DictType: lambda info: f"Record<string, {_type(info.value_type)}>",
    schema.StructType: lambda info: info.cls.__name__,
}


def _type(info: schema.Type) -> str:
    return _WORDS[type(info)](info)


def _list(item: str) -> str:
    return f"({item})[]" if "|" in item else f"{item}[]"


def _is_none(info: schema.Type) -> bool:
    return isinstance(info, schema.NoneType)


if __name__ == "__main__":
    TARGET.write_text(typescript())
