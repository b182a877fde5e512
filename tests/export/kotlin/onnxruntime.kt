// The part of ONNX Runtime's Android library (com.microsoft.onnxruntime:onnxruntime-android) that a bundle's README
// uses: declarations.
package ai.onnxruntime

import java.nio.ByteBuffer
import java.nio.FloatBuffer
import java.util.Optional

enum class OnnxJavaType { UINT8 }

open class OnnxValue {
    val value: Any get() = Any()
}

class OnnxTensor : OnnxValue() {
    companion object {
        fun createTensor(env: OrtEnvironment, data: FloatBuffer, shape: LongArray) = OnnxTensor()
        fun createTensor(env: OrtEnvironment, data: ByteBuffer, shape: LongArray, type: OnnxJavaType) = OnnxTensor()
    }
}

class OrtEnvironment {
    fun createSession(model: ByteArray) = OrtSession()

    companion object {
        fun getEnvironment() = OrtEnvironment()
    }
}

class OrtSession {
    fun run(inputs: Map<String, OnnxTensor>) = Result()

    class Result : AutoCloseable {
        operator fun get(name: String): Optional<OnnxValue> = Optional.empty()
        override fun close() {}
    }
}
