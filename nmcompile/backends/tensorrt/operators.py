"""Operators that the ONNX parser of each TensorRT version imports.

The names are those of DEFINE_BUILTIN_OP_IMPORTER in onnx-tensorrt, branches release/8.6-GA and release/10.1-GA, and
agree with docs/operators.md there. 11 is taken to import what 10.1 does: nothing was removed since.
"""

from __future__ import annotations

from collections.abc import Mapping

_OLDEST = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal
Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool
GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity If ImageScaler
InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not
OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round ScaledTanh Scan Scatter
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth
Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
_OLD = frozenset(_OLDEST.split())
_NEW = _OLD | {"CastLike", "DeformConv", "Gelu", "Hardmax", "Mish"}

IMPORTED: Mapping[str, frozenset[str]] = {"8.6": _OLD, "10": _NEW, "11": _NEW}

# Quantized operators from before Q/DQ: in neither table.
INTEGER = frozenset({"QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"})

# Operators of which the parser gives the first output only.
FIRST_OUTPUT = frozenset({"LayerNormalization", "MaxPool", "BatchNormalization"})
