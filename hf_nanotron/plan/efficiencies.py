"""What the seconds of a step are counted with, beside rates: how often kernels pass over memory, and a few shares.

These are the only constants of the time model that are not arithmetic or rates. Each says what it was set by; the rows
of the benchmarks that set one are marked in `examples/benchmarks/measured_rows.json`, and the others test them.
"""

# Passes over memory of compiled layers, of the bf16 tensors named, forward and backward. From the tables of kernels
# ("Where the time of a step goes", one H200, ours in bf16 at 1B and 8B) over the bytes that one pass takes.
HIDDEN_PASSES = (13.0, 28.0)  # norms, residual sums, casts: of the hidden states of a layer
ROTARY_PASSES = (4.0, 5.5)  # of queries and keys
ACTIVATED_PASSES = (1.5, 2.5)  # of gate and up: two read and one written forward; three and two backward
ATTENTION_BYTES = 47.0  # of a feature of the queries: passes before and after the kernel, fp32 gradients among them
LOGIT_PASSES = 4.0  # of the logits, three and what reads them again
EXPERT_PASSES = (3.0, 4.0)  # of the rows that experts read and write: to the experts, and back
# Layers that are not compiled, over those that are: the one-GPU row of "ZeRO stages".
EAGER = 6.0

# Products in a step over the same without a pause, since power recovers in what lies between: "Power" against the same
# tables (724 and 703 TFLOP/s at 1B and 8B). On a GPU alone.
PRODUCTS_IN_STEP = 1.04
# FP8: bytes of a feature that is turned into FP8 (read twice, written in both orders and read), and those of a weight
# whose gradient is summed apart.
FP8_BYTES = 5.0
FP8_SUM_BYTES = 8.0
FP8_WEIGHT_BYTES = 6.0  # of a weight, once a step

# Bytes of an optimizer's step for a parameter: the fp32 gradient for the norm, and again; the master read and written;
# the bf16 weight. Moments come on top.
OPTIMIZER_BYTES = 4 + 4 + 8 + 2
ROUNDING_BYTES = 4  # of optimizers that do not write the bf16 weights themselves
MOMENTS = {"adam": 2, "lion": 1, "sgd": 0, "muon": 1, "adafactor": 1, "rmsprop": 1, "adagrad": 1}
NEWTON_SCHULZ = 5  # iterations

# The GPU between two kernels, and kernels of a layer and of a step ("GPU waits").
GAP = 1.6e-6
LAYER_KERNELS = 60
STEP_SECONDS = 4e-3
# Kernels that the host launches for a layer, forward and backward; with experts on other ranks the host is the slower
# one ("Tokens are sent once", 8 of 1 sample), and stands still before each exchange ("8 of 4").
LAUNCHES = 150
EXCHANGED_LAYER = 9.3e-3
EXCHANGE_WAIT = 2.6e-3
LAUNCH = 5e-6  # of the host on which these two were measured

# Tensor parallelism with overlap: the share of what is sent that still shows, and passes that join chunks and sum
# partial outputs, of the hidden states of all ranks for each of a layer's exchanges ("8B, tp 2").
TP_SHOWN = 0.35
TP_PASSES = 3.0
TP_EXCHANGES = 4  # in a direction: gathered and summed, around attention and MLP
# ZeRO-2: bytes of an element that is added to the shard of the sum, fp32: both are read, one is written.
ABSORBED_BYTES = 12.0
# ZeRO-3: bytes that `fully_shard` copies for a parameter in each micro-batch ("ZeRO stages", stage 3).
FULLY_SHARDED_BYTES = 40.0
# Pinned copies of activations, one direction: PCIe 5.
PINNED_BYTES_PER_SECOND = 50e9
# Rows that experts get beyond an even load, of the busiest rank.
UNEVEN = 1.0
