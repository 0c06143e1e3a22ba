"""The formats, by how they write calls."""

from tests.parsers.formats import json_calls, other_calls, xml_calls

FORMATS = (*json_calls.FORMATS, *xml_calls.FORMATS, *other_calls.FORMATS)
