"""Cutting of foreign modules into stages, neck and linear head along their torch.fx graph.

Shape letters: B batch, C classes, D features.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.parameter import UninitializedParameter

from ekd_lightning.errors import UserError, unknown_name

UNKNOWN_LOGIT = -1e4
"""Logit of a class that a network does not know: it gives probability 0, and sums of such logits stay finite."""
ABSENT = -1
"""Stands in a list of positions of classes for a class that a network does not know."""
_PROBES = (224, 32, 64)
"""Image sizes in pixels at which stages are detected, unless the network states its own; the first that works."""
_SMALLER = 1.5
"""A stage ends where maps become smaller by at least this factor, so not at an unpadded convolution."""


@contextlib.contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """Restores the mode (train or eval) of every part of a module after the block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@dataclass(frozen=True)
class Parts:
    """The parts of a module; `head(neck(stages(images)))` runs the module's own operations in their order.

    Attributes:
        stages: Name to module, in the order of execution; each returns maps [B, channels, height, width]. Empty if the
            module cannot be cut.
        neck: Maps the last stage's output (without stages: the images) to the head's input.
        head: The linear classifier; `nn.Identity` if the module does not end with one.
        num_features: D, the head's inputs; 0 without a linear head.
    """

    stages: Mapping[str, nn.Module] = field(default_factory=dict)
    neck: nn.Module = field(default_factory=nn.Identity)
    head: nn.Module = field(default_factory=nn.Identity)
    num_features: int = 0


def cut(module: nn.Module, image_size: int | None = None, stages: Mapping[str, str] | None = None) -> Parts:
    """Cuts a classifier into stages, neck and head without changing its outputs.

    The module's containers are traced with `torch.fx`; its blocks stay whole. A cut is possible where the rest of the
    graph needs a single tensor. For every map size, a stage ends at the last possible cut. Stages are called `stem` (if
    its maps have at least half the image's size), `stage1`, `stage2`, and so on. A module that cannot be traced, or
    has forward hooks, is returned whole, as the neck. One that takes none of the sizes tried has no stages, unless they
    are named.

    Args:
        module: Maps normalised images [B, 3, H, W] to logits [B, C]. Its blocks are shared with the parts, not copied.
        image_size: Side in pixels of the square images that it requires; None if it accepts any size.
        stages: Stage name -> name of the submodule that the stage ends with, in order; None detects the stages.

    Raises:
        UserError: If the module returns several values or has lazy layers that never ran; if `stages` is given and the
            module cannot be traced, a submodule does not exist, the module cannot be cut after it, or the stages are
            not in order.
    """
    if any(isinstance(value, UninitializedParameter) for value in module.parameters()):
        raise UserError(f"{type(module).__name__} has lazy layers without weights; run it on images first")
    if (module._forward_hooks or module._forward_pre_hooks) and not stages:
        return Parts(neck=module)  # tracing would lose its hooks
    linears = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    head = linears[-1] if linears else None
    opened = _opened(module, head, stages or {})
    try:
        with keeping_modes(module):
            module.eval()  # leaves out auxiliary classifiers
            graph = _Tracer(opened).trace(module)
            several = not isinstance(_returned(graph), fx.Node)
            whole = _with_dropout(module, graph)
            size, shapes = _shapes(fx.GraphModule(whole, graph), (image_size,) if image_size else _PROBES)
    except Exception:  # data-dependent control flow raises many kinds
        if stages:
            raise UserError(
                f"{type(module).__name__} cannot be traced, so it has no stages {sorted(stages)}; remove the option "
                "stages"
            ) from None
        return Parts(neck=module)
    if several:
        raise UserError(
            f"{type(module).__name__} returns several values or a container: wrap it in a module that returns logits"
        )
    with keeping_modes(module):
        whole.train(module.training)
    classifier = _classifier(whole, graph, head)
    ends = _named(whole, graph, stages) if stages else _by_size(graph, shapes, size, classifier)
    parts: dict[str, nn.Module] = {}
    begin = None
    for name, end in ends.items():
        parts[name] = _between(whole, graph, begin, end)
        begin = end
    if classifier is None:
        return Parts(parts, _between(whole, graph, begin, _result(graph)))
    (given,) = classifier.all_input_nodes
    linear = whole.get_submodule(str(classifier.target))
    assert isinstance(linear, nn.Linear)
    return Parts(parts, _between(whole, graph, begin, given), linear, linear.in_features)


class _Tracer(fx.Tracer):
    """Traces into the modules with the names `opened`; all others are leaves."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened


def _opened(module: nn.Module, head: str | None, stages: Mapping[str, str]) -> set[str]:
    """Returns the modules to trace into, by name: the module, parents of its head and of stage ends, and sequences."""
    names = [name for name, _ in module.named_modules() if name]
    for unknown in set(stages.values()).difference(names):
        raise unknown_name(f"submodule of {type(module).__name__}:", unknown, names)
    opened = {""}
    for path in (head or "", *stages.values()):
        parts = path.split(".")
        opened |= {".".join(parts[:count]) for count in range(1, len(parts))}
    for name, part in module.named_modules():
        if type(part) is nn.Sequential and name.rpartition(".")[0] in opened and name not in stages.values():
            opened.add(name)
    return opened


def _classifier(module: nn.Module, graph: fx.Graph, head: str | None) -> fx.Node | None:
    """Returns the call of the final linear layer if only identities or dropout follow it, else None."""
    result = _result(graph)
    while result.op == "call_module" and result.target != head:
        if not isinstance(module.get_submodule(str(result.target)), nn.Identity | nn.Dropout):
            return None
        (result,) = result.all_input_nodes
    found = result.op == "call_module" and result.target == head
    return result if found and len(result.all_input_nodes) == 1 else None


_DROPOUTS: dict[Any, type[nn.Dropout] | type[nn.Dropout2d] | type[nn.AlphaDropout]] = {
    functional.dropout: nn.Dropout,
    functional.dropout2d: nn.Dropout2d,
    functional.alpha_dropout: nn.AlphaDropout,
}


def _with_dropout(module: nn.Module, graph: fx.Graph) -> nn.Module:
    """Returns a shallow copy of a module, with functional dropout replaced by modules in the graph and in the copy.

    Traced in eval mode, functional dropout would be off in training too.
    """
    extended = copy.copy(module)
    extended._modules = dict(module._modules)
    for node in [node for node in graph.nodes if node.op == "call_function" and node.target in _DROPOUTS]:
        given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        p = given.get("p", 0.5)
        if given.get("training", True) or not p:  # traced in eval mode, it has training=False unless always on
            continue
        name = f"traced_{node.name}"
        extended.add_module(name, _DROPOUTS[node.target](p))
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(name, (given["input"],)))
        graph.erase_node(node)
    return extended


def _returned(graph: fx.Graph) -> object:
    (output,) = graph.find_nodes(op="output")
    return output.args[0]


def _result(graph: fx.Graph) -> fx.Node:
    return cast(fx.Node, _returned(graph))


def _shapes(traced: fx.GraphModule, sizes: tuple[int, ...]) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Returns the first image size that the module takes, and with it `_shapes_at`; nothing if it takes none."""
    for size in sizes:
        with contextlib.suppress(Exception):  # a linear layer after flattened maps of another size
            return size, _shapes_at(traced, size)
    return sizes[0], {}


def _shapes_at(traced: fx.GraphModule, size: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every node's output for one image, by the node's name."""

    def run(module: fx.GraphModule, device: str) -> dict[str, tuple[int, ...]]:
        interpreter = fx.Interpreter(module, garbage_collect_values=False)
        interpreter.extra_traceback = False
        interpreter.run(torch.zeros(1, 3, size, size, device=device))
        return {node.name: value.shape for node, value in interpreter.env.items() if isinstance(value, Tensor)}

    try:
        return run(copy.deepcopy(traced).to("meta"), "meta")
    except Exception:  # the module creates tensors on another device
        with torch.no_grad():
            return run(traced, "cpu")


def _cuts(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes after which the graph can be cut: later nodes need no other output; in order."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    last_use = {node: max((order[user] for user in node.users), default=-1) for node in order}
    found, until = [], -1  # the last use of all earlier outputs
    for node, position in order.items():
        if node.op in ("get_attr", "output"):
            continue
        if node.op != "placeholder" and until <= position and last_use[node] > position:
            found.append(node)
        until = max(until, last_use[node])
    return found


def _by_size(
    graph: fx.Graph, shapes: Mapping[str, tuple[int, ...]], size: int, classifier: fx.Node | None
) -> dict[str, fx.Node]:
    """Returns the last possible cut at each map size, by stage name."""
    ends: list[tuple[int, fx.Node]] = []
    for node in _cuts(graph):
        shape = shapes.get(node.name, ())
        is_map = len(shape) == 4 and shape[2] == shape[3] > 1
        if not is_map or (classifier is None and node is _result(graph)):
            continue
        if ends and ends[-1][0] < _SMALLER * shape[2]:
            ends[-1] = (ends[-1][0], node)
        else:
            ends.append((shape[2], node))
    first = 0 if ends and 2 * ends[0][0] >= size - 2 else 1
    return {f"stage{number}" if number else "stem": node for number, (_, node) in enumerate(ends, first)}


def _named(module: nn.Module, graph: fx.Graph, stages: Mapping[str, str]) -> dict[str, fx.Node]:
    """Returns the nodes at which the user's stages end, by stage name."""
    cuts = _cuts(graph)
    found = {name: [n for n in cuts if n.op == "call_module" and n.target == path] for name, path in stages.items()}
    for name, nodes in found.items():
        if not nodes:
            possible = ", ".join(str(node.target) for node in cuts if node.op == "call_module")
            raise UserError(
                f"{type(module).__name__} cannot be cut after {stages[name]!r} (stage {name!r}; possible: {possible})"
            )
    ends = {name: nodes[-1] for name, nodes in found.items()}
    places = [cuts.index(node) for node in ends.values()]
    if places != sorted(set(places)):
        raise UserError(
            f"stages {dict(stages)} are not in the order in which {type(module).__name__} runs them; list them in that "
            "order, each submodule once"
        )
    return ends


def _between(module: nn.Module, graph: fx.Graph, begin: fx.Node | None, end: fx.Node) -> nn.Module:
    """Extracts the operations after `begin` (None: after the input) up to `end` as a module that shares the weights."""
    (start,) = graph.find_nodes(op="placeholder")[:1]
    own = fx.Graph()
    copied = {begin or start: own.placeholder("maps")}
    needed = _needed(end, begin or start)
    for node in graph.nodes:
        if node in needed:
            copied[node] = own.node_copy(node, copied.__getitem__)
    own.output(copied[end])
    return fx.GraphModule(module, own)


def _needed(end: fx.Node, begin: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is not begin and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def unknown_classes(head: nn.Module) -> frozenset[int]:
    """Returns the positions of the classes that a head does not know (`select_classes`); none if it is not linear."""
    if not isinstance(head, nn.Linear) or head.bias is None:
        return frozenset()
    unknown = (head.bias <= UNKNOWN_LOGIT / 2) & (head.weight == 0).all(1)  # half precision rounds UNKNOWN_LOGIT
    return frozenset(unknown.nonzero().flatten().tolist())


def select_classes(head: nn.Linear, classes: list[int]) -> nn.Linear:
    """Returns a new head that predicts only some classes of a linear head [D -> C].

    `classes` are their positions in 0 .. C-1, in the new order, or `ABSENT` for a class that the head does not know,
    whose logit is then `UNKNOWN_LOGIT`.
    """
    index = torch.tensor(classes, device=head.weight.device)
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias
    chosen = nn.Linear(head.in_features, len(classes))
    with torch.no_grad():
        chosen.weight.copy_(head.weight[index.clamp(min=0)])
        chosen.bias.copy_(bias[index.clamp(min=0)])
        chosen.weight[index < 0] = 0
        chosen.bias[index < 0] = UNKNOWN_LOGIT
    return chosen
