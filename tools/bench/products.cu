// What cuBLASLt offers for the products of a training step in bf16, and what an empty node of a CUDA graph costs: the floors under
// babygpt_cuda.cu's step. `make cuda-bench` runs it.
//
//     products [batch [vocab]]        (512 and 96; 6 layers of width 384, context 192)
//
// For each product: the library's first eight plans in its own order, of which babygpt_cuda.cu takes the first. Microseconds; TFLOP/s of the first.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <vector>

namespace {

#define DO(call)                                                   \
    do {                                                           \
        const int result = static_cast<int>(call);                 \
        if (result != 0) {                                         \
            printf("%s failed with %d\n", #call, result), exit(1); \
        }                                                          \
    } while (false)

constexpr size_t workspace_bytes = size_t(32) << 20;

// As the library has it: columns first. d [m x n] = a [m x k] b [k x n].
struct Shape {
    const char* name;
    int64_t m, n, k;
    bool across_a, across_b, wide, adds;
    cublasLtEpilogue_t epilogue;
    bool wide_bias = wide;  // and where the epilogue sums, its sum
};

__global__ void fill(__nv_bfloat16* to, size_t n, float scale) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
        to[i] = __float2bfloat16_rn((static_cast<float>(i * 2654435761u % 65536u) / 32768.0f - 1) * scale);
}
__global__ void nothing() {}

struct Bench {
    cudaStream_t stream;
    cudaEvent_t begin, end;
    cublasLtHandle_t library;
    __nv_bfloat16 *a, *b, *c, *aux, *bias;
    void* workspace;

    template <class F>
    double microseconds(const F& f) {
        std::vector<float> times;
        for (int i = 0; i < 7; ++i) {
            DO(cudaEventRecord(begin, stream));
            for (int k = 0; k < 4; ++k) f();
            DO(cudaEventRecord(end, stream));
            DO(cudaStreamSynchronize(stream));
            float ms = 0;
            DO(cudaEventElapsedTime(&ms, begin, end));
            times.push_back(ms * 250);
        }
        std::sort(times.begin(), times.end());
        return times[times.size() / 2];
    }
    void time(const Shape& s) {
        cublasLtMatmulDesc_t product;
        cublasLtMatrixLayout_t of_a, of_b, of_d;
        cublasLtMatmulPreference_t wish;
        const int32_t across_a = s.across_a ? CUBLAS_OP_T : CUBLAS_OP_N, across_b = s.across_b ? CUBLAS_OP_T : CUBLAS_OP_N;
        const cudaDataType_t type = s.wide ? CUDA_R_32F : CUDA_R_16BF;
        const bool has_aux = (s.epilogue & 128) != 0;
        const cudaDataType_t bias_type = s.wide_bias ? CUDA_R_32F : CUDA_R_16BF;
        const bool has_bias = (s.epilogue & (4 | 16 | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB)) != 0;
        DO(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        const auto set = [&](cublasLtMatmulDescAttributes_t which, const auto& value) {
            DO(cublasLtMatmulDescSetAttribute(product, which, &value, sizeof value));
        };
        set(CUBLASLT_MATMUL_DESC_TRANSA, across_a), set(CUBLASLT_MATMUL_DESC_TRANSB, across_b);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, s.epilogue);
        if (has_bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias), set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, bias_type);
        if (has_aux) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux), set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, s.m);
        DO(cublasLtMatrixLayoutCreate(&of_a, CUDA_R_16BF, s.across_a ? s.k : s.m, s.across_a ? s.m : s.k, s.across_a ? s.k : s.m));
        DO(cublasLtMatrixLayoutCreate(&of_b, CUDA_R_16BF, s.across_b ? s.n : s.k, s.across_b ? s.k : s.n, s.across_b ? s.n : s.k));
        DO(cublasLtMatrixLayoutCreate(&of_d, type, s.m, s.n, s.m));
        DO(cublasLtMatmulPreferenceCreate(&wish));
        DO(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof workspace_bytes));
        cublasLtMatmulHeuristicResult_t plans[8];
        int found = 0;
        const cublasStatus_t asked = cublasLtMatmulAlgoGetHeuristic(library, product, of_a, of_b, of_d, of_d, wish, 8, plans, &found);
        printf("%-34s", s.name);
        if (asked != CUBLAS_STATUS_SUCCESS || found == 0) printf(" not offered");
        const float one = 1, beta = s.adds ? 1.0f : 0.0f;
        double first = 0;
        for (int i = 0; i < found; ++i) {
            cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
            const double us = microseconds([&] {
                const cublasStatus_t done = cublasLtMatmul(library, product, &one, a, of_a, b, of_b, &beta, c, of_d, c, of_d,
                                                           &plans[i].algo, workspace, workspace_bytes, stream);
                if (status == CUBLAS_STATUS_SUCCESS) status = done;
            });
            if (i == 0) first = us;
            if (status == CUBLAS_STATUS_SUCCESS) printf(" %6.1f", us);
            else printf(" failed");
        }
        const double flops = 2.0 * static_cast<double>(s.m) * static_cast<double>(s.n) * static_cast<double>(s.k);
        if (first > 0) printf("   %.0f TFLOP/s", flops / first / 1e6);
        printf("\n");
    }
};

}  // namespace

int main(int count, char** arguments) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: there is no NVIDIA GPU in this machine\n");
        return 0;
    }
    const int64_t batch = count > 1 ? atoll(arguments[1]) : 512, vocab = count > 2 ? atoll(arguments[2]) : 96, rows = batch * 192;
    const int64_t head_rows = std::min<int64_t>(rows, (int64_t(1) << 27) / vocab / 64 * 64), width = 384;
    const size_t most = static_cast<size_t>(std::max(rows * 4 * width, head_rows * vocab));
    Bench bench{};
    DO(cudaStreamCreate(&bench.stream));
    DO(cudaEventCreate(&bench.begin));
    DO(cudaEventCreate(&bench.end));
    DO(cublasLtCreate(&bench.library));
    DO(cudaMalloc(&bench.workspace, workspace_bytes));
    for (__nv_bfloat16** one : {&bench.a, &bench.b, &bench.c, &bench.aux, &bench.bias}) {
        DO(cudaMalloc(one, 2 * most * sizeof(__nv_bfloat16)));
        fill<<<1024, 256, 0, bench.stream>>>(*one, 2 * most, 0.05f);
    }
    const auto forward = [&](const char* name, int64_t in, int64_t out, bool adds, cublasLtEpilogue_t e) {
        bench.time({name, out, rows, in, false, false, false, adds, e});
    };
    const auto backward = [&](const char* name, int64_t in, int64_t out, cublasLtEpilogue_t e, bool wide_bias = false) {
        bench.time({name, in, rows, out, true, false, false, false, e, wide_bias});
    };
    const auto weights = [&](const char* name, int64_t in, int64_t out, cublasLtEpilogue_t e = CUBLASLT_EPILOGUE_DEFAULT) {
        bench.time({name, out, in, rows, false, true, true, true, e});
    };
    // The same the other way round, so that the gradient is the right side.
    const auto weights_turned = [&](const char* name, int64_t in, int64_t out, cublasLtEpilogue_t e) {
        bench.time({name, in, out, rows, false, true, true, true, e});
    };
    forward("c_attn", width, 3 * width, false, CUBLASLT_EPILOGUE_BIAS);
    forward("c_proj of attention + sum", width, width, true, CUBLASLT_EPILOGUE_BIAS);
    forward("c_fc + GELU", width, 4 * width, false, CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
    forward("c_fc alone", width, 4 * width, false, CUBLASLT_EPILOGUE_BIAS);
    forward("c_proj + sum", 4 * width, width, true, CUBLASLT_EPILOGUE_BIAS);
    backward("dx of c_attn", width, 3 * width, CUBLASLT_EPILOGUE_DEFAULT);
    backward("dx of attention's c_proj", width, width, CUBLASLT_EPILOGUE_DEFAULT);
    backward("dx of c_fc", width, 4 * width, CUBLASLT_EPILOGUE_DEFAULT);
    backward("dx of c_proj, slope of GELU", 4 * width, width, CUBLASLT_EPILOGUE_DGELU);
    backward("the same, and its sum", 4 * width, width, CUBLASLT_EPILOGUE_DGELU_BGRAD);
    backward("the same, and its sum in float", 4 * width, width, CUBLASLT_EPILOGUE_DGELU_BGRAD, true);
    backward("dx of c_proj alone", 4 * width, width, CUBLASLT_EPILOGUE_DEFAULT);
    weights("dW of c_attn", width, 3 * width);
    weights("dW of attention's c_proj", width, width);
    weights("dW of c_fc", width, 4 * width);
    weights("dW of c_proj", 4 * width, width);
    weights("dW of c_attn, and db", width, 3 * width, CUBLASLT_EPILOGUE_BGRADA);
    weights("dW of c_fc, and db", width, 4 * width, CUBLASLT_EPILOGUE_BGRADA);
    weights_turned("dW of c_attn turned, and db", width, 3 * width, CUBLASLT_EPILOGUE_BGRADB);
    weights_turned("dW of c_fc turned, and db", width, 4 * width, CUBLASLT_EPILOGUE_BGRADB);
    bench.time({"logits", vocab, head_rows, width, true, false, false, false, CUBLASLT_EPILOGUE_DEFAULT});
    bench.time({"dx of the head", width, head_rows, vocab, false, false, false, false, CUBLASLT_EPILOGUE_DEFAULT});
    bench.time({"dW of the head", width, vocab, head_rows, false, true, true, true, CUBLASLT_EPILOGUE_DEFAULT});

    constexpr int nodes = 1000;
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    DO(cudaStreamBeginCapture(bench.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < nodes; ++i) nothing<<<132, 256, 0, bench.stream>>>();
    DO(cudaStreamEndCapture(bench.stream, &graph));
    DO(cudaGraphInstantiate(&ready, graph, 0));
    printf("an empty node of a graph: %.2f us\n", bench.microseconds([&] { DO(cudaGraphLaunch(ready, bench.stream)); }) / nodes);
    return 0;
}
