// The part of ExecuTorch's Android library (org.pytorch:executorch-android) that a bundle's README uses: declarations.
package org.pytorch.executorch

class Tensor {
    val dataAsFloatArray: FloatArray get() = FloatArray(0)

    companion object {
        fun fromBlob(data: FloatArray, shape: LongArray) = Tensor()
    }
}

class EValue {
    fun toTensor() = Tensor()

    companion object {
        fun from(tensor: Tensor) = EValue()
    }
}

class Module {
    fun forward(vararg inputs: EValue): Array<EValue> = arrayOf(*inputs)

    companion object {
        fun load(path: String) = Module()
    }
}
