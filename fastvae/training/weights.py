"""Weights laid out for a fast step: one float32 tensor, and copies in the dtype of the matrix products."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.model import ModelError

# what autocast computes in low precision, with weights that it would cast at each use
_MATRIX_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class FlatWeights:
    """The float32 weights of `model` as one tensor, so that the optimizer has one tensor to update.

    The model's own parameters become views of it, each with its layout (channels_last, say). `lent` puts
    copies in `amp_dtype` into the linear and convolutional layers while a step runs; they are cast once an
    update, all together. Parameters with hooks have none, whose gradients the hooks would not see. Parameters
    of another dtype, those without gradients and those in `exclude` stay as they are.

    flat: all weights; its gradient is filled by `gather_gradients`.
    copies: their copies in `amp_dtype`, in the same places; None for float32.
    offsets: where in them each parameter begins.
    leaves: where the gradient of each parameter arrives: the parameter itself, or its copy.
    names: of the parameters, in the same order.
    gradients: those that `gather_gradients` moved, by parameter: views of `flat.grad`.
    summed: these where they are gathered and added up over ranks, None where no rank has one; else None.
    """

    def __init__(
        self, model: nn.Module, amp_dtype: torch.dtype = torch.float32, exclude: Iterable[nn.Parameter] = ()
    ) -> None:
        excluded = list(exclude)
        left_out = {id(p) for p in excluded}
        own = {
            name: p
            for name, p in model.named_parameters()
            if p.dtype == torch.float32 and id(p) not in left_out
        }
        named = {name: p for name, p in own.items() if p.requires_grad}
        self._known = {id(p) for p in model.parameters() if p.requires_grad}
        self._frozen = [p for p in own.values() if not p.requires_grad]
        self.names, self._parameters = list(named), list(named.values())
        device = self._parameters[0].device if self._parameters else None
        n = sum(map(_padded, self._parameters))
        self.flat = nn.Parameter(torch.zeros(n, dtype=torch.float32, device=device))
        self.offsets = [0, *itertools.accumulate(map(_padded, self._parameters))][:-1]
        for parameter, view in zip(self._parameters, self.views(self.flat.detach()), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self._places = [(p, p.detach()) for p in (*self._parameters, *excluded)]
        self.gradients: list[Tensor] = []
        self.summed: list[Tensor | None] | None = None

        self.copies: Tensor | None = None
        self._swaps: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self.leaves = list(self._parameters)
        if amp_dtype != torch.float32:
            self.copies = self.flat.detach().to(amp_dtype)
            copies = [nn.Parameter(view) for view in self.views(self.copies)]
            places = {id(p): i for i, p in enumerate(self._parameters)}
            for module in model.modules():
                if not isinstance(module, _MATRIX_MODULES):
                    continue
                for name, parameter in module.named_parameters(recurse=False):
                    place = places.get(id(parameter))
                    if place is not None and not has_hooks(parameter):
                        self._swaps.append((module, name, parameter, copies[place]))
                        self.leaves[place] = copies[place]
        self._copied_to = [copy.data_ptr() for *_, copy in self._swaps]
        self._is_to_compare = True

    @property
    def is_half(self) -> bool:
        """Whether the copies are float16, whose gradients need a scale."""
        return self.copies is not None and self.copies.dtype == torch.float16

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While it lasts, the layers hold the copies. Raises ModelError where these were written."""
        written = 0 if self.copies is None else self.copies._version
        for module, name, _, copy in self._swaps:
            module._parameters[name] = copy
        try:
            yield
        finally:
            for module, name, parameter, _ in self._swaps:
                module._parameters[name] = parameter
        if self.copies is None:
            return
        swaps = zip(self._swaps, self._copied_to, strict=True)
        is_written = self.copies._version != written
        is_written |= any(copy.data_ptr() != place for (*_, copy), place in swaps)
        if is_written or (self._is_to_compare and not self._copies_are_alike()):
            raise ModelError(
                "model: got one that writes into weights in encode or decode with amp, expected them to be "
                "left to the optimizer; train without amp, or use torch.nn.utils.parametrizations"
            )

    def _copies_are_alike(self) -> bool:
        """Whether those that are lent have the values of the weights, which a write to `data` changes unseen.

        To be asked once an epoch, and on a CPU alone: a GPU would be waited for.
        """
        self._is_to_compare = False
        return self.flat.device.type != "cpu" or all(
            torch.equal(copy.detach().view(torch.int16), weight.detach().to(copy.dtype).view(torch.int16))
            for _, _, weight, copy in self._swaps
        )

    def follow(self, model: nn.Module) -> None:
        """Train what requires gradients now, and nothing else, from what its values are now.

        Raises ModelError for a parameter that required none at first or was not there, and so is not trained.
        """
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or id(parameter) in self._known:
                continue
            if id(parameter) in map(id, self._frozen):
                raise ModelError(
                    f"model: got {name} unfrozen in the training, expected it to require gradients at its "
                    "beginning; freeze it in on_start of a callback"
                )
            raise ModelError(
                f"model: got another parameter as {name} in the training, expected those of its beginning; "
                "write into what is there, as by copy_()"
            )
        for module, name, parameter, copy in self._swaps:
            if has_hooks(parameter):
                got = f"a hook of the {name} of a {type(module).__name__} in the training"
                raise ModelError(f"model: got {got}, expected it before fit, or no amp")
            copy.requires_grad_(parameter.requires_grad)
        self.take_up()
        self.refresh_copies()
        self._is_to_compare = True

    def take_up(self) -> None:
        """Take the values of parameters whose owner has set their `data`."""
        for parameter, place in self._places:
            if parameter.data_ptr() != place.data_ptr():
                place.copy_(parameter.detach())
                parameter.data = place

    def are_finite(self) -> bool:
        """Whether all weights are; waits for the device."""
        if self.flat.numel() == 0:
            return True
        # NaN comes through, and one pass without a tensor of its size is ten times faster
        return bool(torch.stack(self.flat.detach().aminmax()).isfinite().all())

    def gather_gradients(self) -> None:
        """Move the gradients of the last backward into `flat.grad`; absent ones are zero."""
        if self.summed is not None:
            return
        if self.flat.grad is None:
            self.use_gradient_memory(torch.zeros_like(self.flat))
        absent, filled, arrived = [], [], []
        for leaf, view in zip(self.leaves, self.gradients, strict=True):
            if leaf.grad is None:
                absent.append(view)
            else:
                filled.append(view)
                arrived.append(leaf.grad)
            leaf.grad = None
        if absent:
            torch._foreach_zero_(absent)
        if arrived:
            torch._foreach_copy_(filled, arrived)

    def own_gradients(self) -> list[Tensor | None]:
        """The gradient of each parameter, where it has one: as it has arrived, or summed over ranks."""
        return [leaf.grad for leaf in self.leaves] if self.summed is None else self.summed

    def use_gradient_memory(self, memory: Tensor) -> None:
        """Let `flat.grad` be this memory."""
        self.flat.grad = memory
        self.gradients = self.views(memory)

    def refresh_copies(self) -> None:
        """Bring the copies up to date with `flat`, after an update of `flat` alone."""
        if self.copies is not None:
            self.copies.copy_(self.flat.detach())

    def release(self) -> None:
        """Give the model's parameters memory of their own again."""
        for parameter in self._parameters:
            parameter.data = parameter.detach().clone()

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` in the shapes of the parameters, laid out as they are."""
        parts = flat.split([_padded(p) for p in self._parameters])
        return [
            part.as_strided(p.shape, torch.empty_like(p).stride(), part.storage_offset())
            for part, p in zip(parts, self._parameters, strict=True)
        ]


def has_hooks(parameter: Tensor) -> bool:
    """Whether its gradient goes through code of its owner."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _padded(parameter: nn.Parameter) -> int:
    """Elements of `flat` for one parameter: each begins on a cache line in every dtype."""
    return -(-parameter.numel() // 64) * 64
