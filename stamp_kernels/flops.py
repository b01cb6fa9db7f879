"""FLOP counts of the ops: `import stamp_kernels.flops` registers them with torch.utils.flop_counter.

`import stamp_kernels` does not do so because torch's counter imports Triton, which takes seconds.

Example:

    import stamp_kernels.flops
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode() as counter:
        loss = model(batch)
        loss.backward()
    counter.get_total_flops()

Attention counts the query-key pairs of the batch, without padding (under fake tensors an upper bound from max_seqlen).
Reading the lengths waits for the device.
"""

from torch.utils.flop_counter import flop_registry

import stamp_kernels  # noqa: F401  (its ops define the formulas)
from stamp_kernels.ops._library import FLOP_FORMULAS

flop_registry.update(FLOP_FORMULAS)
