"""Model files: damaged and hostile ones, memory, and what is left behind when writing fails."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import parse, parse_model, seeded

from nmcompile import ir as g
from nmcompile.errors import GraphError
from nmcompile.ir import tensor as graph_tensor

TEXT = "(float[N,64] x) => (float[N,64] y) <float[64,64] w, float[64] b> { h = MatMul(x, w)  y = Add(h, b) }"


def refused(source: Path | onnx.ModelProto, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        g.load(source)
    assert "\n" not in str(caught.value)


def write_external(folder: Path, **changes: str) -> Path:
    """A model whose weight w lies in w.bin; `changes` overwrite the entries that say where."""
    model = parse_model(TEXT)
    tensor = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "offset": "0", "length": str(64 * 64 * 4), **changes}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


# ---- files that are no models -----------------------------------------------------------------------------


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    refused(tmp_path / "no.onnx", "no.onnx: no such file")
    refused(tmp_path, "is a folder")
    path = tmp_path / "m.onnx"
    for content, message in (
        (b"", "is empty"),
        (b"PK\x03\x04 a zip file", "not an ONNX model"),
        (b"\0" * 99, "not an"),
    ):
        path.write_bytes(content)
        refused(path, message)
    path.write_text('{"json": true}\n' * 99)
    refused(path, "not an ONNX model")


def test_a_model_cut_short_anywhere(tmp_path: Path) -> None:
    whole = parse_model(TEXT).SerializeToString()
    path = tmp_path / "m.onnx"
    for size in (1, 10, 100, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "m.onnx|initializer|graph|import|tensor|node|output|stage|load")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_give_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "m.onnx"
    content = bytearray(parse_model(TEXT.replace("64", "20")).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        g.load(path)
    except GraphError as error:
        assert "\n" not in str(error)


# ---- external data ------------------------------------------------------------------------------------------


def test_external_data_are_mapped(tmp_path: Path) -> None:
    graph = g.load(write_external(tmp_path))
    weight = g.linear_layers(graph)[0].weight
    np.testing.assert_array_equal(weight, seeded("w", [64, 64]).T)
    base: object = weight
    while not isinstance(base, np.memmap) and getattr(base, "base", None) is not None:
        base = base.base  # type: ignore[attr-defined]
    assert isinstance(base, (np.memmap, memoryview)) or type(base).__name__ == "mmap"


@pytest.mark.parametrize(("changes", "message"), [
    ({"location": "/etc/passwd"}, "leaves the model's folder"),
    ({"location": "../w.bin"}, "leaves the model's folder"),
    ({"location": "link.bin"}, "leaves the model's folder"),
    ({"location": ""}, "have no location"),
    ({"location": "gone.bin"}, "gone.bin is missing"),
    ({"location": "sub"}, "cannot be read"),
    ({"offset": "4"}, "beyond|lies"),
    ({"offset": "-4"}, "beyond|lies"),
    ({"offset": "many"}, "not a number"),
    ({"length": "99999999999"}, "does not fit"),
    ({"length": "4"}, "does not fit"),
])  # fmt: skip
def test_external_data_that_do_not_fit(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(b"\0" * 20000)
    (home / "link.bin").symlink_to(tmp_path / "secret.bin")
    refused(write_external(home, **changes), f"initializer 'w'.*({message})")


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """Hugging Face keeps files as blobs and links to them from a snapshot."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    os.rename(write_external(tmp_path), tmp_path / "blobs" / "aaaa")
    os.rename(tmp_path / "w.bin", tmp_path / "blobs" / "bbbb")
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blobs/aaaa")
    (tmp_path / "snapshot" / "w.bin").symlink_to("../blobs/bbbb")
    assert len(g.linear_layers(g.load(tmp_path / "snapshot" / "model.onnx"))) == 1


def test_external_file_cut_short(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    os.truncate(tmp_path / "w.bin", 1000)
    refused(path, "the file is cut short")
    refused(onnx.load(path, load_external_data=False), "load the model from its path")


def test_external_data_inside_subgraphs(tmp_path: Path) -> None:
    model = parse_model("""(float[2] x, bool c) => (float[2] y) { y = If (c) <
        then_branch = a () => (float[2] z) <float[2] v = {1, 2}> { z = Add(x, v) },
        else_branch = b () => (float[2] z) { z = Neg(x) }> }""")
    tensor = model.graph.node[0].attribute[0].g.initializer[0]
    (tmp_path / "v.bin").write_bytes(np.array([5, 6], np.float32).tobytes())
    tensor.CopyFrom(onnx.TensorProto(name="v", dims=[2], data_type=1, data_location=onnx.TensorProto.EXTERNAL))
    tensor.external_data.add(key="location", value="v.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    graph = g.load(tmp_path / "m.onnx")
    assert g.run(graph, {"x": np.zeros(2, np.float32), "c": np.array(True)})["y"].tolist() == [5, 6]


# ---- hostile graphs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["raw", "typed", "none", "external"])
def test_a_tensor_that_claims_to_be_huge(fill: str, tmp_path: Path) -> None:
    model = parse_model(TEXT)
    claim = onnx.TensorProto(name="w", data_type=1, dims=[1 << 20, 1 << 20])
    if fill == "raw":
        claim.raw_data = b"\0" * 4096
    elif fill == "typed":
        claim.float_data.extend([0.0] * 4)
    elif fill == "external":
        claim.data_location = onnx.TensorProto.EXTERNAL
        claim.external_data.add(key="location", value="m.onnx")
    model.graph.initializer[0].CopyFrom(claim)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "m.onnx", "initializer 'w'")


def test_a_sparse_initializer_that_claims_to_be_huge() -> None:
    model = parse_model("(float[2] x) => (float[2] y) { y = Add(x, w) }")
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "w")
    sparse = onnx.helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array([0]), "i"), [1 << 40])
    model.graph.sparse_initializer.append(sparse)
    refused(model, "too large to be made dense")


def test_graphs_that_are_not_legal() -> None:
    def changed(**edits: object) -> onnx.ModelProto:
        model = parse_model(TEXT)
        if "opset" in edits:
            model.opset_import[0].version = int(str(edits["opset"]))
        return model

    refused(changed(opset=10), "opset 10, the oldest supported is 11")
    refused(changed(opset=999), "opset 999, the installed onnx knows")
    model = changed()
    del model.opset_import[:]
    refused(model, "imports no ONNX operator set")
    model = changed()
    model.graph.node[1].output[0] = "h"
    refused(model, "tensor 'h' is produced twice")
    model = changed()
    model.graph.initializer.append(model.graph.initializer[0])
    refused(model, "initializer 'w' is declared twice")
    model = changed()
    model.graph.node[0].input[0] = "y"
    refused(model, "cycle")
    model = changed()
    model.graph.node[0].input[0] = "nowhere"
    refused(model, "'nowhere' is neither computed, an input, nor a weight")
    model = changed()
    model.graph.output[0].name = "nowhere"
    refused(model, "output 'nowhere' is not computed")
    model = changed()
    model.graph.initializer[0].dims[0] = -64
    refused(model, "negative size")


def test_nodes_that_do_not_fit_their_operator(tmp_path: Path) -> None:
    model = parse_model(TEXT)
    del model.graph.node[0].input[1:]
    refused(model, r"node 'h' \(MatMul\) has 1 inputs, the operator takes 2")
    model = parse_model("(float[N,4] x) => (float[N,4] y) { y = Cast <to = 1> (x) }")
    model.graph.node[0].attribute[0].CopyFrom(onnx.helper.make_attribute("to", "float"))
    refused(model, "attribute to is of the wrong type")
    del model.graph.node[0].attribute[:]
    refused(model, "lacks the attribute to")
    content = parse_model(TEXT.replace("y)", "long_name)").replace("y =", "long_name =")).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content.replace(b"long_name", b"\xff\xfe_name__"[:9]))
    refused(tmp_path / "m.onnx", "m.onnx: .*UTF-8")


# ---- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("external", [False, True])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    error: BaseException, external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    g.save(parse(TEXT), path, external=external)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}

    def fail(_: object) -> memoryview:
        raise error

    monkeypatch.setattr(graph_tensor, "raw_bytes", fail)
    big = gs.Constant("w", np.zeros((64, 64), np.float32))
    y = gs.Variable("y", np.dtype(np.float32), [64, 64])
    graph = gs.Graph([gs.Node("Relu", "relu", inputs=[big], outputs=[y])], [], [y], opset=20)
    with pytest.raises(GraphError if isinstance(error, OSError) else KeyboardInterrupt):
        g.save(graph, path, external=external)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_saving_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"cannot write .*: No such file or directory"):
        g.save(parse(TEXT), tmp_path / "no" / "m.onnx")
    with pytest.raises(GraphError, match="cannot write"):
        g.save(parse(TEXT), tmp_path)


def test_saved_files_are_plain_onnx_with_usual_permissions(tmp_path: Path) -> None:
    for name, external in (("inside", False), ("outside", True)):
        path = tmp_path / f"{name}.onnx"
        g.save(parse(TEXT), path, external=external)
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path)
        weight = next(item for item in model.graph.initializer if item.name == "w")
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(weight), seeded("w", [64, 64]))
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert sorted(item.name for item in tmp_path.iterdir()) == ["inside.onnx", "outside.onnx", "outside.onnx.data"]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    g.save(parse(TEXT), tmp_path / "a.onnx")
    g.save(g.load(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# ---- memory -------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from nmcompile import ir as g
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base = peak()
graph = g.load(sys.argv[1])
g.infer_shapes(graph)
g.verify(g.copy(graph), "test")
g.save(graph, sys.argv[2], external=sys.argv[3] == "True")
print(peak() - base)
"""


def chain(folder: Path, layers: int, width: int, *, external: bool, sparse: bool = False) -> Path:
    """A model of `layers` weights [width, width] float32; `sparse` makes the data file without writing it."""
    x = gs.Variable("x", np.dtype(np.float32), ["n", width])
    nodes, last = [], x
    for index in range(layers):
        y = gs.Variable(f"y{index}", np.dtype(np.float32), ["n", width])
        values = np.broadcast_to(np.float32(index), (width, width)) if sparse else np.full((width, width), index, "f4")
        nodes.append(gs.Node("MatMul", f"n{index}", inputs=[last, gs.Constant(f"w{index}", values)], outputs=[y]))
        last = y
    graph = gs.Graph(nodes, [x], [last], opset=20)
    path = folder / "chain.onnx"
    if not sparse:
        g.save(graph, path, external=external)
        return path
    model, weights = g.weightless(graph)
    size = width * width * 4
    for index, tensor in enumerate(item for item in model.graph.initializer if item.name in weights):
        del tensor.external_data[:]
        for key, value in (("location", "chain.data"), ("offset", index * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
    with open(folder / "chain.data", "wb") as file:
        file.truncate(layers * size)
    path.write_bytes(model.SerializeToString())
    return path


def peak_memory(source: Path, target: Path, external: bool) -> int:
    command = [sys.executable, "-c", MEASURE, str(source), str(target), str(external)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=500).stdout)


@pytest.mark.parametrize(("read", "write"), [(False, False), (True, True), (False, True)])
def test_weights_are_never_held_twice(read: bool, write: bool, tmp_path: Path) -> None:
    source = chain(tmp_path, 18, 2048, external=read)  # 302 MB
    size = sum(item.stat().st_size for item in tmp_path.iterdir())
    assert size > 300_000_000
    assert peak_memory(source, tmp_path / "out.onnx", write) < 1.3 * size


@pytest.mark.big
def test_models_above_two_gigabytes(tmp_path: Path) -> None:
    source = chain(tmp_path, 33, 4096, external=True, sparse=True)  # 2.2 GB
    size = (tmp_path / "chain.data").stat().st_size
    assert size > 1 << 31
    target = tmp_path / "out.onnx"
    assert peak_memory(source, target, True) < 1.3 * size
    graph = g.load(target)
    g.save(graph, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx.data").stat().st_size >= size
    with pytest.raises(GraphError, match="2 GB"):
        g.to_model(graph)
    with pytest.raises(GraphError, match="do not fit into one file"):
        g.save(graph, tmp_path / "inside.onnx", external=False)
