// A .pte of exitkit on a phone: one sample stops at the first exit that is sure enough.
//
// Link with ExecuTorch's extension_module, extension_tensor, xnnpack_backend and its optimized (or portable) kernels.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstdio>
#include <limits>
#include <string>
#include <vector>

using executorch::aten::Tensor;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::EValue;

struct Answer {
  std::vector<EValue> values;  // the last two: logits (1, C) float32, score (1,) float64; they live until the next call
  size_t exit;
};

Answer classify(Module& model, const std::vector<double>& thresholds, std::vector<EValue> values) {
  for (size_t exit = 0;; ++exit) {
    values = std::move(model.execute("step_" + std::to_string(exit), values).get());
    const double score = values.back().toTensor().const_data_ptr<double>()[0];
    if (exit == thresholds.size() || score > thresholds[exit]) return {std::move(values), exit};
    values.resize(values.size() - 2);  // the next step takes what is left without logits and score
  }
}

int main(int argc, char** argv) {
  Module model(argc > 1 ? argv[1] : "model.pte");
  const EValue stored = model.get("thresholds").get();
  const Tensor tau = stored.toTensor();
  const std::vector<double> thresholds(tau.const_data_ptr<double>(), tau.const_data_ptr<double>() + tau.numel());

  std::vector<float> image(3 * 32 * 32, 0.5f);  // the camera's, as the manifest's "preprocessing" says
  const auto input = from_blob(image.data(), {1, 3, 32, 32});
  const Answer answer = classify(model, thresholds, {EValue(*input)});
  const Tensor logits = answer.values[answer.values.size() - 2].toTensor();
  size_t best = 0;
  for (ssize_t label = 1; label < logits.numel(); ++label)
    if (logits.const_data_ptr<float>()[label] > logits.const_data_ptr<float>()[best]) best = label;
  std::printf("class %zu at exit %zu\n", best, answer.exit);
}
