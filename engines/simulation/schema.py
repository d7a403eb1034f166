"""The least value that a JSON schema accepts.

Pure. What it does not know (patterns, formats, conditions) it does not heed.
"""

from __future__ import annotations

from typing import Any

_DEEPEST = 32


class SchemaError(ValueError):
    """The schema is none, or cannot be met by a small value."""


def least_instance(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """Return a small value that ``schema`` accepts. SchemaError when there is none to be found."""
    root = schema if root is None else root
    if depth > _DEEPEST:
        raise SchemaError("the schema is nested too deeply")
    if schema is True or schema == {}:
        return None
    if not isinstance(schema, dict):
        raise SchemaError(f"Invalid schema: {schema!r}")
    if "const" in schema:
        return schema["const"]
    if enum := schema.get("enum"):
        return enum[0]
    if "$ref" in schema:
        return least_instance(_resolve(schema["$ref"], root), root, depth + 1)
    if parts := schema.get("allOf"):
        rest = {key: value for key, value in schema.items() if key != "allOf"}
        return least_instance(_merged([rest, *parts], root), root, depth + 1)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return _first_possible(options, root, depth)
    return _of_type(schema, root, depth)


def _first_possible(options: list[Any], root: Any, depth: int) -> Any:
    problem = SchemaError("no option of the schema is possible")
    for option in options:
        try:
            return least_instance(option, root, depth + 1)
        except SchemaError as error:
            problem = error
    raise problem


def _resolve(reference: str, root: Any) -> Any:
    node = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, dict) or part not in node:
            raise SchemaError(f"Pointer '{reference}' does not exist")
        node = node[part]
    return node


def _merged(parts: list[Any], root: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        while isinstance(part, dict) and "$ref" in part:
            part = _resolve(part["$ref"], root)
        for key, value in part.items() if isinstance(part, dict) else ():
            if key == "properties":
                whole[key] = {**whole.get(key, {}), **value}
            elif key == "required":
                whole[key] = [*whole.get(key, []), *value]
            else:
                whole[key] = value
    return whole


def _of_type(schema: dict[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind is None:
        kind = "object" if "properties" in schema else "array" if "items" in schema else "null"
    match kind:
        case "object":
            known = schema.get("properties", {})
            return {name: least_instance(known.get(name, {}), root, depth + 1) for name in schema.get("required", ())}
        case "array":
            first = schema.get("prefixItems", [])
            count = max(schema.get("minItems", 0), 0)
            items = [*first, *[schema.get("items", {})] * count][:count]
            return [least_instance(item, root, depth + 1) for item in items]
        case "string":
            text = "word"[: schema.get("maxLength", 4)]
            return text + "a" * (schema.get("minLength", 0) - len(text))
        case "integer" | "number":
            return _number(schema, whole=kind == "integer")
        case "boolean":
            return True
        case "null":
            return None
    raise SchemaError(f"Invalid type: {kind}")


def _number(schema: dict[str, Any], *, whole: bool) -> float | int:
    step = schema.get("multipleOf", 1 if whole else 0)
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    value: float | int = 0
    if low is not None:
        value = max(value, low) if low > 0 else value
    if above is not None and value <= above:
        value = above + (step or 1)
    if high is not None and value > high:
        value = high
    if below is not None and value >= below:
        value = below - (step or 1)
    if step:
        value = -(-value // step) * step
    return int(value) if whole else value
