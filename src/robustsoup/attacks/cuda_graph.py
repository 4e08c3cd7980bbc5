"""CUDA graphs: replay one recorded step of an attack instead of launching its kernels one by one.

The rules of https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs apply: warm up on a
side stream, change static tensors in place, never synchronise inside the step.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from robustsoup.errors import ModelError

WARM_UP_STEPS = 3
"""Steps before recording, in which libraries choose their kernels and allocate workspaces."""


def capture_step(
    step: Callable[[], None], state: list[Tensor], result: Tensor
) -> Callable[[], None]:
    """Return `step` as a CUDA graph, or `step` itself if it cannot be replayed faithfully.

    A step that synchronises with the host cannot be captured. A step that draws random numbers on
    the host can, but every replay would repeat the recorded numbers; it differs between two calls
    from the same state while its replays agree.

    The caller must keep every tensor alive that `step` reads: a graph holds only addresses.

    Args:
        step: Changes `state` in place on the current device.
        state: Every tensor that `step` changes; restored before this function returns or raises.
        result: The tensor of `state` to compare between calls.
    """
    before = [tensor.clone() for tensor in state]
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()

    def run_from_before(call: Callable[[], None]) -> Tensor:
        _copy_into(state, before)
        call()
        return result.clone()

    try:
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                called = [run_from_before(step) for _ in range(WARM_UP_STEPS)]
        finally:  # also if the step raises: `state` must not be restored while it is running
            current.wait_stream(side)
        graph = _record_graph(step, side)
        if graph is None:
            return step
        replayed = [run_from_before(graph.replay) for _ in range(2)]
        return step if freezes_randomness(called[-2:], replayed) else graph.replay
    finally:
        _copy_into(state, before)


class ReplayedCall:
    """Calls one function on the same shapes again and again, on a GPU as a CUDA graph.

    The second of two calls in a row that agree in everything but the values records the graph;
    later ones copy their inputs and replay it. Anywhere else the function is simply called.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._inputs: dict[str, Tensor] = {}
        self._output = torch.empty(0)
        self._replay: Callable[[], None] | None = None

    def __call__(
        self,
        function: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        model: nn.Module,
        settings: Hashable,
    ) -> Tensor:
        """Return function(**inputs).

        Args:
            function: Depends on nothing but its inputs, the model and the settings, and never
                waits for the device after its first call.
            inputs: Tensors by argument name, on the model's device.
            model: Network that the function calls; its weights may change in place between calls.
            settings: Everything else that the function depends on.

        Returns:
            The result. The next call may overwrite it.
        """
        device = next(iter(inputs.values())).device
        if device.type != "cuda":
            return function(**inputs)
        addresses = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
        layouts = tuple((name, t.shape, t.stride(), t.dtype) for name, t in inputs.items())
        key = (settings, addresses, layouts)
        if key != self._key:
            self._key, self._replay = key, None
            return function(**inputs)
        with torch.cuda.device(device):
            replay = self._replay or self._record(function, inputs)
            for name, tensor in inputs.items():
                self._inputs[name].copy_(tensor)
            replay()
        return self._output

    def _record(
        self, function: Callable[..., Tensor], inputs: dict[str, Tensor]
    ) -> Callable[[], None]:
        output = torch.empty_like(function(**inputs))
        copies = {name: tensor.clone() for name, tensor in inputs.items()}

        def call() -> None:
            output.copy_(function(**copies))

        self._inputs, self._output = copies, output
        self._replay = capture_step(call, [output], output)
        return self._replay


def freezes_randomness(called: list[Tensor], replayed: list[Tensor]) -> bool:
    """Return whether two calls of a step differ while two replays of its graph agree."""
    return not torch.equal(*called) and torch.equal(*replayed)


def _copy_into(state: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)


def _record_graph(step: Callable[[], None], side: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """Capture `step` on the stream `side`; return None and restore the stream if that fails.

    `side` is passed explicitly: the default capture stream belongs to the first device that ever
    captured a graph. "thread_local" permits other threads to allocate memory meanwhile.
    """
    current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            step()
    except (RuntimeError, ModelError):  # `call_network` turns the first into the second
        # A failed capture leaves `side` as the current stream, and leaves the default generator
        # in capture mode, in which every later random number on this device raises an error.
        torch.cuda.set_stream(current)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        return None
    return graph
