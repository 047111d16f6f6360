"""The layers of an engine are read from what a builder lists, and tell how each product is computed."""

import pytest

from sonoedge.export.engines.inspection import Layer, Tensor, parse_layers
from sonoedge.export.engines.products import Product, built_products

# As TensorRT-RTX 1.7 lists them: constants apart, "Datatype".
GEMM = (
    "Name: product_myl0_1, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [64,512], Strides: [512,1], StrideOrder: "
    "[1,0], Datatype: Int8, Format: (Linear) Row major linear format }], Constants: [ { Name: b, Dimensions: "
    "[512,256], Strides: [1,512], StrideOrder: [0,1], Datatype: Int8, Format: (Transposed) Transposed format }, "
    "{ Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major "
    "linear format }], Outputs: [ { Name: c, Dimensions: [64,256], Strides: [256,1], StrideOrder: [1,0], Datatype: "
    "Float, Format: (Linear) Row major linear format }], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: "
    "product][ONNX Layer: dq]"
)
UNPACK = (
    "Name: __myl_CastMul_myl0_4, LayerType: kgen, Inputs: [], Constants: [ { Name: s, Dimensions: [1,480], Datatype: "
    "Float }, { Name: w, Dimensions: [160,480], Datatype: Int8 }], Outputs: [ { Name: o, Dimensions: [1,160,480], "
    "Datatype: Float }], TacticName: x, StreamId: 0, Metadata: [ONNX Layer: qkv/dq]"
)
# As TensorRT 10 lists them: "Format/Datatype", constants among the inputs.
FULL = (
    "Name: fc_myl9_4, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [1,4096], Format/Datatype: Half }, { Name: w, "
    "Dimensions: [4096,1000], Format/Datatype: Int8 }], Outputs: [ { Name: o, Dimensions: [-1,1000], Format/Datatype: "
    "Half }], TacticName: t, TacticValue: 0x28, StreamId: 0, Metadata: [ONNX Layer: fc]"
)
PLAIN = (
    "Name: Reformatting CopyNode for x, LayerType: Reformat, Inputs: [ { Name: x, Location: Device, Dimensions: [], "
    "Format/Datatype: Float }], Outputs: [], TacticValue: 0x0"
)


def test_a_listing_is_read() -> None:
    gemm, unpack, full, plain = parse_layers(f"{GEMM}\n{UNPACK}\n{FULL}\n{PLAIN}\n\nI/O Tensors:\nName: x, IOMode: I")
    assert gemm == Layer(
        "product_myl0_1",
        "gemm",
        (Tensor("Int8", (64, 512)), Tensor("Int8", (512, 256)), Tensor("Float", (1,))),
        (Tensor("Float", (64, 256)),),
        "[ONNX Layer: product][ONNX Layer: dq]",
    )
    assert full.inputs == (Tensor("Half", (1, 4096)), Tensor("Int8", (4096, 1000)))
    assert full.outputs == (Tensor("Half", (-1, 1000)),)
    assert plain == Layer("Reformatting CopyNode for x", "Reformat", (Tensor("Float", ()),), (), "")
    assert [layer.unpacks for layer in (gemm, unpack, full, plain)] == [False, True, False, False]
    assert [layer.multiplies_int8 for layer in (gemm, unpack, full, plain)] == [True, False, False, False]
    assert [layer.reads_int8_weights for layer in (gemm, unpack, full, plain)] == [True, True, True, False]


def test_nothing_listed_is_nothing_known() -> None:
    assert parse_layers("") == ()
    products = built_products([Product("p", "int8", "[ONNX Layer: p]", "[ONNX Layer: d]")], ())
    assert products.not_int8 == ("p",)


def layer(origin: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], kind: str = "gemm") -> Layer:
    return Layer(f"{kind} of {origin}", kind, inputs, outputs, origin)


WEIGHTS = Tensor("Int8", (160, 480))
UNPACKING = layer("[dq]", (Tensor("Float", (1, 480)), WEIGHTS), (Tensor("Half", (160, 480)),), "kgen")
IN_HALF = layer("[p]", (Tensor("Half", (8, 160)), Tensor("Half", (160, 480))), (Tensor("Half", (8, 480)),))
ONE_ROW = layer("[p][dq]", (Tensor("Int8", (1, 160)), WEIGHTS), (Tensor("Float", (1, 480)),))
FUSED = layer("[p][dq]", (Tensor("Half", (8, 160)), WEIGHTS), (Tensor("Half", (8, 480)),), "runtime_fusion")
AS_MANY_ROWS = layer("[p][dq]", (Tensor("Half", (160, 160)), WEIGHTS), (Tensor("Half", (160, 480)),))


@pytest.mark.parametrize(
    ("asked", "layers", "kept"),
    [
        ("int8", [ONE_ROW], True),
        ("int8", [FUSED], False),
        ("int8", [UNPACKING, IN_HALF], False),
        ("int8", [ONE_ROW, UNPACKING, IN_HALF], False),  # right in one optimization profile, wrong in another
        ("int8 weights", [FUSED], True),
        ("int8 weights", [AS_MANY_ROWS], True),  # as many values out as weights in, and yet a product
        ("int8 weights", [IN_HALF, UNPACKING], False),
        ("int8 weights", [], False),
        ("float", [], True),
    ],
)
def test_a_product_is_found_as_it_was_built(asked: str, layers: list[Layer], kept: bool) -> None:
    product = Product("p", asked, "[p]", "[dq]")  # type: ignore[arg-type]
    found = built_products([product], layers)
    assert (found.int8, found.int8_weights, found.float).count(1) == kept
    assert (found.not_int8 + found.unpacked == ("p",)) is not kept
