"""FLOP counts of the ops: after `import stamp_kernels.flops`, torch.utils.flop_counter.FlopCounterMode knows them.

Apart from `import stamp_kernels` because torch's counter imports Triton, which takes seconds.

Example:

    import stamp_kernels.flops
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode() as counter:
        loss = model(batch)
        loss.backward()
    counter.get_total_flops()

Attention counts the query-key pairs that the batch really has, not the padded ones (an upper bound from max_seqlen
under fake tensors). To read the lengths it waits for the device.
"""

from torch.utils.flop_counter import flop_registry

import stamp_kernels  # noqa: F401  (its ops define the formulas)
from stamp_kernels.ops._library import FLOP_FORMULAS

flop_registry.update(FLOP_FORMULAS)
