"""Control nets in lockstep with a transformer: each of their blocks runs just before the first
block that it tells something, so that only one of its outputs is there at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..offload.chunking import Chunking, split
from ..offload.offloaded_module import onloaded
from ..offload.weight_block import WeightBlock
from .conditioning import Conditions, blocks_of
from .controlnet import Control, outputs_of
from .geometry import FluxGeometry, lockstep
from .step_cache import Visits
from .transformer import DiT
from .velocity import TOKENS_OF_ENDS, Pass, Ropes, begun


@dataclass(frozen=True)
class ControlTokens:
    """What a control net is given, for a whole run, on the device.

    conditions: of each prompt; hint: [n, tokens, channels], for each picture of the batch its own
    or again the first.
    """

    control: Control
    conditions: Sequence[Conditions]
    hint: Tensor

    @classmethod
    def of(
        cls, control: Control, conditions: Sequence[Conditions], latents: Tensor, batch: int
    ) -> "ControlTokens":
        """latents: of what it shows, in model space, for a batch of so many pictures."""
        told = [control.told(each) for each in conditions]
        return cls(control, told, control.hint(latents)[:batch].to(told[0].text))


@dataclass
class _Beside:
    """A control net beside one pass of the transformer.

    due: its blocks that run just before each of the transformer's; outputs: [batch, image tokens,
    width] for each prompt, of the last of them.
    """

    control: Control
    running: Pass
    due: Sequence[Sequence[int]]
    outputs: list[Tensor] = field(default_factory=list)

    def before(self, number: int, chunking: Chunking) -> None:
        net, due = self.control.net.weights.module, self.due[number]
        if due:
            self.outputs.clear()  # before there are others: they take memory
        for own in due:
            self.running.through(blocks_of(net)[own], chunking)
        for own in due[-1:]:
            with onloaded(layer := outputs_of(net)[own]):
                self.outputs += [_told(layer, s.image, chunking) for s in self.running.sequences]

    def after(self, into: Pass) -> None:
        for sequence, output in zip(into.sequences, self.outputs, strict=False):
            sequence.image.add_(output, alpha=self.control.strength)


class Lockstep:
    """How sequences pass through the blocks of a transformer while control nets tell it something.

    What was found is added to the tokens of the image after each block, as in ComfyUI.
    """

    def __init__(self, geometry: FluxGeometry, given: Sequence[ControlTokens]):
        self._geometry, self._given = geometry, given
        self._ropes: Ropes = {}

    def __call__(self, dit: Any, running: Pass, chunking: Chunking) -> Iterator[None]:
        sigma = running.sigma.item()
        beside = [
            self._begun(each, running, chunking)
            for each in self._given
            if each.control.acts_at(sigma)
        ]
        for number, block in enumerate(blocks_of(dit)):
            for each in beside:
                if number == len(dit.blocks):  # what was found is for joint blocks alone
                    each.outputs.clear()
                each.before(number, chunking)
            running.through(block, chunking)
            for each in beside:
                each.after(running)
            yield

    def _begun(self, given: ControlTokens, beside: Pass, chunking: Chunking) -> _Beside:
        net: Any = given.control.net.weights.module
        at = (beside.latents, beside.sigma, self._ropes, chunking)
        running = begun(net, given.conditions, *at)
        for sequence in running.sequences:
            for number, image in enumerate(sequence.image):
                hint = given.hint[number % len(given.hint)]
                for some in split(slice(0, len(image)), TOKENS_OF_ENDS):
                    shown = partial(net.controlnet_x_embedder, hint[some])
                    image[some] += chunking.retry(shown)
        return _Beside(given.control, running, lockstep(self._geometry, given.control.net.geometry))


def _told(layer: Any, image: Tensor, chunking: Chunking) -> Tensor:
    """What the layer after a block makes of its [batch, tokens, width], in the run's dtype."""
    dtype = image.dtype if layer.method is None else layer.method.dtype
    found = chunking.retry(partial(image.new_empty, image.shape, dtype=dtype))
    for out, tokens in zip(found.split(1), image.split(1), strict=True):
        chunking.for_each(slice(0, image.shape[1]), partial(_write, layer, tokens, out))
    return found


def _write(layer: Any, tokens: Tensor, out: Tensor, some: slice) -> None:
    layer(layer.rows(tokens[:, some]), out=out[:, some])


def visits_once(dit: DiT, controls: Sequence[Control]) -> list[WeightBlock]:
    """The weights that a run needs before its passes, in their order."""
    nets = list({id(control.net): control.net for control in controls}.values())
    return [*dit.weights.once, *(block for net in nets for block in net.weights.once)]


def visits(dit: DiT, controls: Sequence[Control], sigmas: Sequence[float]) -> list[Visits]:
    """The weights in the order in which passes at these noise levels need them."""
    main = [
        [dit.weights.block_of(part[0]) for part in block.weight_blocks()]
        for block in blocks_of(dit.weights.module)
    ]
    due = [(control, lockstep(dit.geometry, control.net.geometry)) for control in controls]

    def of_pass(sigma: float) -> Visits:
        acting = [(control.net, blocks) for control, blocks in due if control.acts_at(sigma)]
        return [
            [*(visit for net, blocks in acting for visit in net.visits(blocks[number])), *own]
            for number, own in enumerate(main)
        ]

    return [of_pass(sigma) for sigma in sigmas]
