"""Whether a chat template takes `content` as text or as parts: decided by whether it ever loops over it.

An engine decides this once per template, by reading its syntax tree, and everything in a conversation is shaped after
it; so the same must be found here. A loop counts when it runs over `content` of a message, over a variable or macro
parameter such content was bound to, or over a variable simply called `content` outside macros; filters, tests and
slices in between are looked through. Source: vLLM 0.32 renderers/hf.py, `_detect_content_format`.
"""

from __future__ import annotations

from jinja2 import nodes

from kvatlas_common.prompts.messages import ContentFormat


def content_format(tree: nodes.Template) -> ContentFormat:
    try:
        return ContentFormat.OPENAI if _loops_over_content(tree) else ContentFormat.STRING
    except _Unfollowed:
        return ContentFormat.STRING


class _Unfollowed(Exception):
    """Messages or content are bound to something that is not one plain name."""


def _loops_over_content(tree: nodes.Template) -> bool:
    messages = _aliases(tree, "messages")
    message_names = {_name(loop.target) for loop in tree.find_all(nodes.For) if _is_one_of(loop.iter, messages)}
    in_macros: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        given = _parameters_given_content(tree, macro, message_names)
        for loop in macro.find_all(nodes.For):
            in_macros[id(loop)] = in_macros.get(id(loop), set()) | given
    for loop in tree.find_all(nodes.For):
        over = loop.iter
        if any(_reads(over, name, "content") for name in message_names) or (
            isinstance(over, nodes.Name) and over.name in in_macros.get(id(loop), {"content"})
        ):
            return bool(_name(loop.target))
    return False


def _name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _Unfollowed
    return target.name


def _aliases(tree: nodes.Node, name: str) -> set[str]:
    """`name`, and every variable that it, or an alias of it, is assigned to."""
    known, fresh = {name}, {name}
    while fresh:
        fresh = {_name(a.target) for a in tree.find_all(nodes.Assign) if _is_one_of(a.node, fresh)} - known
        known |= fresh
    return known


def _parameters_given_content(tree: nodes.Node, macro: nodes.Macro, message_names: set[str]) -> set[str]:
    names = [argument.name for argument in macro.args]
    given: set[str] = set()
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        passed = [*zip(names, call.args, strict=False), *((k.key, k.value) for k in call.kwargs if k.key in names)]
        given |= {name for name, value in passed if any(_reads(value, m, "content") for m in message_names)}
    return given


def _is_one_of(node: nodes.Node, names: set[str]) -> bool:
    node = _bare(node)
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name in names


def _reads(node: nodes.Node, name: str, key: str) -> bool:
    """`name['key']` or `name.key`."""
    node = _bare(node)
    match node:
        case nodes.Getitem(arg=nodes.Const(value=value)) if value == key:
            return _is_name(node.node, name)
        case nodes.Getattr(attr=attribute) if attribute == key:
            return _is_name(node.node, name)
    return False


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _bare(node: nodes.Node) -> nodes.Node:
    """Without filters, tests and slices around it."""
    while True:
        match node:
            case nodes.Filter(node=nodes.Node() as inner) | nodes.Test(node=inner):
                node = inner
            case nodes.Getitem(node=inner, arg=nodes.Slice()):
                node = inner
            case _:
                return node
