"""Dynamic int8: weights stored as 8-bit integers, activations rounded as they come."""

import tempfile
from pathlib import Path

from effvit.errors import UserError


def quantize(source: Path, target: Path) -> None:
    """Write the ONNX file ``source`` to ``target`` with the weights of its linear maps in int8.

    Each output channel has its own scale; biases, norms, the patch embedding and products of activations stay
    float32. Weights keep to 7 bits, so that sums of products fit the 16-bit registers of any processor and the
    result is the same with and without VNNI.

    Raises:
        UserError: onnxruntime cannot quantise the graph.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as directory:
        folded = Path(directory, "folded.onnx")
        try:
            # Folds what is computed from weights alone, such as their parts, into weights.
            quant_pre_process(source, folded, skip_symbolic_shape=True)
            model = onnx.load(folded)
            del model.graph.value_info[:]  # before 1.32 onnxruntime leaves shapes that are not so after folding
            quantize_dynamic(
                model,
                target,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # of many kinds, by its documentation of none
            cause = str(error).strip().partition("\n")[0]
            raise UserError(f"{source.name}: onnxruntime cannot quantise it: {cause}") from error
