"""Builds one engine from one graph, the same way with TensorRT and with TensorRT-RTX."""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.buckets import Extent, fit, same_in_all
from sonoedge.export.engines.inspection import parse_layers
from sonoedge.export.engines.library import Library
from sonoedge.export.engines.log import Record, make_logger
from sonoedge.export.engines.monitor import Phases, make_monitor
from sonoedge.export.engines.onnx_inputs import fix_inputs
from sonoedge.export.engines.products import Products, asked_products, built_products
from sonoedge.export.engines.timing import open_timing_cache, save_timing_cache
from sonoedge.progress import track

_WAIT_S = 0.1  # between looks for Ctrl-C


class Target(msgspec.Struct, frozen=True):
    """What engines are built with and for."""

    library: Library
    sm: int  # compute capability without the point
    timing_cache: Path | None = None  # read before a build and written after, by a builder that keeps one


class Built(msgspec.Struct, frozen=True):
    """One engine on the disk."""

    path: Path
    sha256: str
    bytes: int
    layers: int
    products: Products
    workspace_bytes: int | None  # device memory that an execution needs beside weights, in the largest profile
    seconds: float


def build_engine(target: Target, graph: Path, out: Path, profiles: Sequence[dict[str, Extent]]) -> Built:
    """Build `graph` for the target and write the plan to `out`.

    profiles: the shapes of each input in each optimization profile. Raises SonoEdgeError for a graph that the library
    refuses or that takes other shapes, OSError for a disk that is full.
    """
    began = time.monotonic()
    module, record = target.library.module, Record()
    logger = make_logger(module, record)
    builder = module.Builder(logger)
    if builder is None:
        raise _refused(target, graph, record)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)  # the network's weights are the parser's: it must outlive the build
    model = fix_inputs(graph.read_bytes(), same_in_all(profiles), graph.name)
    if not parser.parse(model, str(graph)):  # the path tells where the weights are
        record.errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)] or record.errors
        raise _refused(target, graph, record)
    config = _configure(target, builder)
    asked = asked_products(network)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    declared = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    for shapes in profiles:
        _add_profile(builder, config, fit(declared, shapes, graph.name))
    cache = open_timing_cache(target.library, config, target.timing_cache)
    with out.open("wb") as file, track(f"build {out.name}", 1.0) as advance:
        phases = Phases(advance)
        monitor = make_monitor(module, phases)
        config.progress_monitor = monitor
        sink = _Sink(file)
        done = _in_thread(lambda: _serialize(target.library, builder, network, config, sink), phases)
        if sink.error is not None:
            raise sink.error
        if not done:
            raise _refused(target, graph, record)
    save_timing_cache(cache, target.timing_cache)
    layers = parse_layers(record.layers)
    return Built(
        path=out,
        sha256=sink.digest.hexdigest(),
        bytes=sink.bytes,
        layers=len(layers),
        products=built_products(asked, layers),
        workspace_bytes=max(record.activation_bytes, default=None),
        seconds=round(time.monotonic() - began, 1),
    )


def _configure(target: Target, builder: Any) -> Any:
    """The settings of a build; TensorRT-RTX is told the GPU, TensorRT builds for the one that is here."""
    module = target.library.module
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # the layers and types of what is built are read
    if not target.library.needs_gpu:
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or a captured pass would allocate memory
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(module.ComputeCapability, f"SM{target.sm}"), 0)
    return config


def _add_profile(builder: Any, config: Any, shapes: Mapping[str, Extent]) -> None:
    profile = builder.create_optimization_profile()
    for name, extent in shapes.items():
        profile.set_shape(name, extent.least, extent.most, extent.most)
    if config.add_optimization_profile(profile) < 0:
        raise SonoEdgeError(f"the builder refuses the shapes {shapes}: this is a defect, report it")


def _serialize(library: Library, builder: Any, network: Any, config: Any, sink: "_Sink") -> bool:
    """Build and write the plan; where the library can, piece by piece, which spares a copy of all weights in memory."""
    if library.streams:
        return bool(builder.build_serialized_network_to_stream(network, config, _make_writer(library.module, sink)))
    plan = builder.build_serialized_network(network, config)
    if plan is not None:
        sink.write(memoryview(plan))
    return plan is not None


def _make_writer(module: Any, sink: "_Sink") -> Any:
    """A stream writer of the builder's library into `sink`."""

    class Writer(module.IStreamWriter):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            super().__init__()

        def write(self, data: bytes) -> int:
            return sink.write(memoryview(data))

    return Writer()


class _Sink:
    """A file with its SHA-256; keeps an error instead of raising it, since it is written from inside the builder."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        """Write it all and return how much that was; less tells the builder that it failed."""
        if self.error is not None:
            return 0
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            return 0
        self.digest.update(data)
        self.bytes += data.nbytes
        return data.nbytes


def _in_thread(work: Callable[[], bool], phases: Phases) -> bool:
    """Run the build beside this thread, which Ctrl-C reaches: an exception may not pass through the builder."""
    results: list[bool | BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # told in the thread that waits
            results.append(error)
        over.set()

    threading.Thread(target=run, name="engine-build", daemon=True).start()
    try:
        while not over.wait(_WAIT_S):
            pass
    except BaseException:
        phases.stopped = True
        over.wait()
        raise
    match results[0]:
        case BaseException() as error:
            raise error
        case result:
            return result


def _parser_error(error: Any) -> str:
    place = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    return f"{place}{error.desc()}"


def _refused(target: Target, graph: Path, record: Record) -> SonoEdgeError:
    reason = record.errors[0] if record.errors else "it says no reason"
    return SonoEdgeError(
        f"{target.library} cannot build {graph.name} for sm_{target.sm} ({reason}): build the bundle again with this "
        "SonoEdge, or report it"
    )
