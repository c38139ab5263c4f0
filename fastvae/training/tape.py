"""A step's tensor operations, recorded while it runs and replayed without autograd and without modules.

On a CPU, where operations of a small model take as long as the Python and the autograd around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .. import _native
from ..ops import library
from ..ops.native import Plan
from ..ops.products import Product
from .weights import has_hooks

_aten = torch.ops.aten
_SAME_TENSOR = {_aten.detach.default, _aten.alias.default}  # where no autograd looks on
_ELSE_WITHOUT_AUTOGRAD = {_aten.mkldnn_rnn_layer.default}  # of an LSTM: keeps nothing for its backward
_METHODS = {"forward", "encode", "decode"}
_SUM = _aten.sum.dim_IntList
_PRODUCTS = {_aten.addmm.default: (1, 2, 0), _aten.mm.default: (0, 1)}  # where a, b and bias are
# the same operations, called in half the time
_SHORT: dict[Any, Callable[..., Any]] = {
    _aten.addmm.default: torch.addmm,
    _aten.cat.default: torch.cat,
    _aten.mm.default: torch.mm,
    _aten.relu.default: torch.relu,
    _aten.t.default: torch.t,
    _aten.view.default: Tensor.view,
    _SUM: torch.sum,
}


class Tape:
    """What `record` has recorded: call it with inputs of the same shapes and dtypes."""

    def __init__(self, graph: fx.Graph, constants: Sequence[Tensor]) -> None:
        self.graph = graph
        self._replay: Callable[..., tuple[Any, ...]] = fx.GraphModule({}, graph).forward
        self._constants = constants

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """The outputs for new inputs and for what the weights and buffers are now."""
        with torch._C._DisableAutocast():  # which has cast what was recorded
            return self._replay(*inputs, *self._constants)


def record(
    function: Callable[..., tuple[Any, ...]], *inputs: Tensor, lasting: int | None = None
) -> tuple[tuple[Any, ...], Tape | None]:
    """Call `function`, which gives tensors and None, and give its outputs and its tape.

    The tape makes the same tensor operations on the same tensors, random ones and in-place ones too; all that
    Python decided on the way stays decided. It is None where Python looked into a tensor (as by `item`), so
    that the next call might go another way.

    lasting: so many of the tape's outputs, the first, lie in new memory at each call; the memory of the
        others may be that of the call before. None is all.
    """
    recorder = _Recorder(inputs)
    with recorder:
        outputs = function(*inputs)
    return outputs, recorder.tape(outputs, lasting)


def is_recordable(*modules: nn.Module) -> bool:
    """Whether these modules do the same tensor operations at each call, as far as one can know.

    So do the layers of torch and the models here, without hooks; of other code nothing is known, such as
    methods that an instance was given, and what torch.compile makes of one.
    """
    return all(
        type(module).__module__.startswith(("torch.nn.", "fastvae."))
        and vars(module).keys().isdisjoint(_METHODS)
        and module._compiled_call_impl is None
        and not any((module._forward_pre_hooks, module._forward_hooks))
        and not any((module._backward_pre_hooks, module._backward_hooks))
        and not any(has_hooks(p) for p in module._parameters.values() if p is not None)
        for top in modules
        for module in top.modules()
    )


class TapeProducts(TorchDispatchMode):
    """While it lasts, products are made as a tape makes them: the same to the bit, which torch's are not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = _native.ProductMemory()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import torch._dynamo, for a second and more

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and not kwargs and Product.serves(*(args[i] for i in _PRODUCTS[func])):
            args = tuple(args[i] for i in _PRODUCTS[func])
            func = Product(args[0], args[1], self._memory)
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)


class _Recorder(TapeProducts):
    """Writes each tensor operation into an fx.Graph; tensors that it did not make are constants."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._made: dict[int, fx.Node] = {}
        self._constants: dict[int, tuple[fx.Node, Tensor]] = {}
        self._storages: set[int] = set()  # of what was made
        self._alive: list[Tensor] = []  # so that no id and no address is used twice
        self._can_replay = True
        for i, tensor in enumerate(inputs):
            self._add(tensor, self._graph.placeholder(f"input_{i}"))
        self._last_placeholder = next(iter(reversed(self._graph.nodes)))

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._can_replay &= func not in _ELSE_WITHOUT_AUTOGRAD
        result = func(*args, **kwargs)
        tensors = [t for t in _tensors((args, kwargs)) if id(t) in self._made]
        if tensors and (
            func in _SAME_TENSOR or (func is _aten.view.default and result.shape == args[0].shape)
        ):
            self._add(result, self._made[id(tensors[0])])
        elif tensors or isinstance(func, Product) or not func.is_view:  # a view of a constant is a constant
            given = list(_tensors((args, kwargs)))
            if func in library.OPS:
                func, args = library.plan(func, args)
            arguments = tree_map_only(Tensor, self._node, (args, dict(kwargs)))
            self._add_result(result, self._graph.call_function(func, *arguments), given)
        return result

    def tape(self, outputs: Sequence[Tensor | None], lasting: int | None) -> Tape | None:
        self._graph.output(tuple(None if t is None else self._node(t) for t in outputs))
        if not self._can_replay:
            return None
        _simplify(self._graph)
        leaving = {_address(t) for t in outputs[:lasting] if t is not None}
        for node in self._graph.nodes:
            if isinstance(node.target, (Plan, Product)):
                node.target.reuse([address not in leaving for address in node.meta["storages"]])
        return Tape(self._graph, [tensor for _, tensor in self._constants.values()])

    def _add_result(self, result: Any, node: fx.Node, given: list[Tensor]) -> None:
        if isinstance(result, Tensor):
            if not any(result is t for t in given):  # in-place operations give what they were given
                self._add(result, node)
        elif isinstance(result, (list, tuple)):
            node.meta["storages"] = [_address(t) for t in _tensors(result)]
            for i, part in enumerate(result):
                if part is not None:
                    self._add_result(part, self._graph.call_function(_getitem, (node, i)), given)
        elif result is not None:
            self._can_replay = False  # a number, which Python may look at

    def _add(self, tensor: Tensor, node: fx.Node) -> None:
        self._made[id(tensor)] = node
        node.meta |= {"shape": tensor.shape, "dtype": tensor.dtype, "storages": [_address(tensor)]}
        self._storages.add(_address(tensor))
        self._alive.append(tensor)

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._made:
            return self._made[id(tensor)]
        if _address(tensor) in self._storages:
            self._can_replay = False  # a view that was made where no operation is seen
        if id(tensor) not in self._constants:
            with self._graph.inserting_after(self._last_placeholder):
                node = self._graph.placeholder(f"constant_{len(self._constants)}")
            self._last_placeholder = node
            self._constants[id(tensor)] = node, tensor
        return self._constants[id(tensor)][0]


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, Mapping):
        yield from _tensors(tuple(tree.values()))


def _address(tensor: Tensor) -> int:
    """Of its storage, by which views are known."""
    return tensor.untyped_storage().data_ptr()


def _getitem(results: Sequence[Any], i: int) -> Any:
    return results[i]


def _simplify(graph: fx.Graph) -> None:
    """Leave out transposes of transposes, what is not used and detours; call the rest by the shortest way."""
    for node in list(graph.nodes):
        if isinstance(node.target, Product):  # which knows the strides
            node.args = tuple(_origin(arg) for arg in node.args)
        elif node.target is _aten.relu.default and _is_of_product(node):
            node.args[0].target.then_relu()
            _take_place(node, node.args[0])
        elif _is_backward_of_relu(node):
            product, where, _ = node.args
            a, b, *bias = product.args
            product.args = (a, b, *(bias or [None]), where)
            _take_place(node, product)
        elif node.target is _aten.t.default and node.args[0].target is _aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
        elif node.target is _aten.view.default and _drops_dim_of_sum(node):
            total = node.args[0]
            total.args = total.args[:2]
            node.replace_all_uses_with(total)
            graph.erase_node(node)
        elif node.target is _getitem and node.args[0].target is _aten.split.Tensor:
            (x, size, *rest), i = node.args[0].args, node.args[1]
            dim = rest[0] if rest else 0
            node.target, node.args = torch.narrow, (x, dim, i * size, node.meta["shape"][dim])
        elif node.target is _aten._to_copy.default and list(node.kwargs) == ["dtype"]:
            dtype = node.kwargs["dtype"]
            if node.args[0].meta.get("dtype", dtype) != dtype:  # else `to` gives what it was given
                node.target, node.args, node.kwargs = Tensor.to, (*node.args, dtype), {}
    for node in reversed(list(graph.nodes)):
        if not node.users and node.target in (_aten.t.default, _aten.split.Tensor, _getitem):
            graph.erase_node(node)
        elif node.target is _SUM and len(node.args) == 2 and len(node.args[1]) == 1:
            node.target, node.args = Tensor.sum, (node.args[0], node.args[1][0])
        elif node.op == "call_function" and not node.kwargs:
            node.target = _SHORT.get(node.target, node.target)


def _origin(node: Any) -> Any:
    """What the node is a transpose of."""
    while isinstance(node, fx.Node) and node.target is _aten.t.default:
        node = node.args[0]
    return node


def _is_of_product(node: fx.Node) -> bool:
    """Whether the first that it is given is a product that nobody else sees."""
    product: Any = node.args[0]
    return isinstance(product.target, Product) and len(product.users) == 1


def _is_backward_of_relu(node: fx.Node) -> bool:
    """Whether it takes a product to the other side of a ReLU that gave a product too."""
    if node.target is not _aten.threshold_backward.default or not _is_of_product(node):
        return False
    where: Any
    product, where, threshold = node.args
    return isinstance(where.target, Product) and bool(where < product and threshold == 0)


def _take_place(node: fx.Node, product: fx.Node) -> None:
    """Let the product be the node."""
    product.meta = node.meta
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _drops_dim_of_sum(view: fx.Node) -> bool:
    """Whether all that a view does is to take away the dimension that a sum over one has kept."""
    total: Any = view.args[0]
    if (
        total.target is not _SUM
        or total.args[2:] != (True,)
        or len(total.args[1]) != 1
        or len(total.users) != 1
    ):
        return False
    shape = list(total.meta["shape"])
    del shape[total.args[1][0]]
    return shape == list(view.meta["shape"])
