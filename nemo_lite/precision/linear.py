"""What a linear multiplies with: the number format's matmul.

A matmul takes x [..., in] in the computing dtype and the weight [out, in] as it is stored (float32 master weights in
training, packed codes after `quantize_weights`), and returns [..., out] in x's dtype. A linear is given its matmul by
name when it is built; the plain one is the kernels' op `linear`.
"""

from collections.abc import Callable

from torch import Tensor

Matmul = Callable[[Tensor, Tensor], Tensor]
