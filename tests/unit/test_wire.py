"""`proto/backend.proto` is the orchestrator's wire, as `tests/wire.tsv` lists it, and explains all of it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

from common.pb import backend_pb2

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "wire.tsv"


@pytest.fixture(scope="module")
def compiled() -> FileDescriptorProto:
    file = FileDescriptorProto()
    backend_pb2.DESCRIPTOR.CopyToProto(file)
    return file


def test_the_table_is_read_whole() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(rows) == len(wire_of_table())


def test_package_service_and_syntax(compiled: FileDescriptorProto) -> None:
    assert compiled.syntax == "proto3"
    assert compiled.package == "backend"
    assert [service.name for service in compiled.service] == ["Backend"]
    assert not compiled.dependency
    assert not compiled.extension


def test_the_proto_is_the_table(compiled: FileDescriptorProto) -> None:
    expected, actual = wire_of_table(), wire_of_descriptor(compiled)
    drift = [f"missing: {entry} {expected[entry]}" for entry in expected.keys() - actual.keys()]
    drift += [f"extra:   {entry} {actual[entry]}" for entry in actual.keys() - expected.keys()]
    drift += [
        f"changed: {entry} is {actual[entry]}, must be {expected[entry]}"
        for entry in expected.keys() & actual.keys()
        if expected[entry] != actual[entry]
    ]
    assert not drift, "proto/backend.proto and tests/wire.tsv part:\n" + "\n".join(sorted(drift))


def test_every_entry_has_a_comment(tmp_path: Path) -> None:
    described = tmp_path / "backend.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", "--include_source_info"]
    subprocess.run([*command, f"--descriptor_set_out={described}", "backend.proto"], cwd=ROOT, check=True)
    (file,) = FileDescriptorSet.FromString(described.read_bytes()).file
    commented = {
        tuple(location.path)
        for location in file.source_code_info.location
        if location.leading_comments.strip() or location.trailing_comments.strip()
    }
    entries = list(entries_of_file(file))
    assert entries
    bare = [name for path, name in entries if path not in commented]
    assert not bare, "without a comment in proto/backend.proto: " + ", ".join(bare)


def wire_of_table() -> dict[str, str]:
    """Each row as what it names -> what it says of it."""
    wire: dict[str, str] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        match line.split("\t"):
            case ["rpc", name, request, response]:
                wire[f"rpc {name}"] = f"({request}) returns ({response})"
            case ["message", name]:
                wire[f"message {name}"] = ""
            case ["field", message, name, number, kind]:
                wire[f"field {message}.{name}"] = f"{kind} = {number}"
            case ["reserved", message, number]:
                wire[f"reserved {message} {number}"] = ""
            case ["enum", enum, name, number]:
                wire[f"enum {enum}.{name}"] = f"= {number}"
            case [comment] if comment.startswith("#"):
                pass
            case _:
                pytest.fail(f"tests/wire.tsv has a row of no known kind: {line!r}")
    return wire


def wire_of_descriptor(file: FileDescriptorProto) -> dict[str, str]:
    """What is compiled, in the words of the table."""
    wire: dict[str, str] = {}
    for service in file.service:
        for method in service.method:
            request = "stream " * method.client_streaming + unqualified(method.input_type)
            response = "stream " * method.server_streaming + unqualified(method.output_type)
            wire[f"rpc {method.name}"] = f"({request}) returns ({response})"
    for message in file.message_type:
        wire |= wire_of_message(message, message.name)
    for enum in file.enum_type:
        wire |= wire_of_enum(enum, enum.name)
    return wire


def wire_of_message(message: DescriptorProto, name: str) -> dict[str, str]:
    wire = {f"message {name}": ""}
    for field in message.field:
        wire[f"field {name}.{field.name}"] = f"{type_of(field, message)} = {field.number}"
    for gap in message.reserved_range:
        wire |= {f"reserved {name} {number}": "" for number in range(gap.start, gap.end)}
    wire |= {f"reserved {name} {reserved}": "" for reserved in message.reserved_name}
    for nested in message.nested_type:
        if not nested.options.map_entry:
            wire |= wire_of_message(nested, f"{name}.{nested.name}")
    for enum in message.enum_type:
        wire |= wire_of_enum(enum, f"{name}.{enum.name}")
    return wire


def wire_of_enum(enum: EnumDescriptorProto, name: str) -> dict[str, str]:
    wire = {f"enum {name}.{value.name}": f"= {value.number}" for value in enum.value}
    for gap in enum.reserved_range:  # of an enum, unlike a message, the end is part of the range
        wire |= {f"reserved {name} {number}": "" for number in range(gap.start, gap.end + 1)}
    return wire


def type_of(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    for entry in message.nested_type:
        if entry.options.map_entry and field.type_name.endswith(f".{message.name}.{entry.name}"):
            key, value = entry.field
            return f"map<{bare_type(key)},{bare_type(value)}>"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {bare_type(field)}"
    if field.proto3_optional:
        return f"optional {bare_type(field)}"
    if field.HasField("oneof_index"):
        return f"oneof {message.oneof_decl[field.oneof_index].name} {bare_type(field)}"
    return bare_type(field)


def bare_type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return unqualified(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def unqualified(name: str) -> str:
    return name.removeprefix(".backend.")


# A comment is found by the path of what it belongs to: field numbers of the descriptor and positions in them.
Entry = tuple[tuple[int, ...], str]


def entries_of_file(file: FileDescriptorProto) -> Iterator[Entry]:
    for at, service in enumerate(file.service):
        path: tuple[int, ...] = (FileDescriptorProto.SERVICE_FIELD_NUMBER, at)
        yield path, service.name
        for method_at, method in enumerate(service.method):
            yield (*path, ServiceDescriptorProto.METHOD_FIELD_NUMBER, method_at), method.name
    for at, message in enumerate(file.message_type):
        yield from entries_of_message(message, message.name, (FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, at))
    for at, enum in enumerate(file.enum_type):
        yield from entries_of_enum(enum, enum.name, (FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER, at))


def entries_of_message(message: DescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[Entry]:
    yield path, name
    for at, field in enumerate(message.field):
        yield (*path, DescriptorProto.FIELD_FIELD_NUMBER, at), f"{name}.{field.name}"
    for at, oneof in enumerate(message.oneof_decl):
        yield (*path, DescriptorProto.ONEOF_DECL_FIELD_NUMBER, at), f"{name}.{oneof.name}"
    for at, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            nested_path = (*path, DescriptorProto.NESTED_TYPE_FIELD_NUMBER, at)
            yield from entries_of_message(nested, f"{name}.{nested.name}", nested_path)
    for at, enum in enumerate(message.enum_type):
        enum_path = (*path, DescriptorProto.ENUM_TYPE_FIELD_NUMBER, at)
        yield from entries_of_enum(enum, f"{name}.{enum.name}", enum_path)


def entries_of_enum(enum: EnumDescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[Entry]:
    yield path, name
    for at, value in enumerate(enum.value):
        yield (*path, EnumDescriptorProto.VALUE_FIELD_NUMBER, at), f"{name}.{value.name}"
