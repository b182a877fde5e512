// The part of LiteRT's Android library (com.google.ai.edge.litert:litert) that a bundle's README uses: declarations.
package org.tensorflow.lite

import java.io.File

class Tensor {
    class QuantizationParams(val scale: Float, val zeroPoint: Int)

    fun quantizationParams() = QuantizationParams(1f, 0)
}

class Interpreter(model: File) {
    fun run(input: Any, output: Any) {}
    fun getInputTensor(index: Int) = Tensor()
    fun getOutputTensor(index: Int) = Tensor()
}
