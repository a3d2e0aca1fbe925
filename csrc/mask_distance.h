#pragma once
#include "torch_abi.h"

// int64 [B,Ke], int64 [B,Kp], grid (T,H,W) -> float32 [B,Ke]: sqrt(Euclidean distance to the nearest of masks_pred /
// divisor)
vjepa::Tensor mask_distance(const vjepa::Tensor& masks_enc, const vjepa::Tensor& masks_pred, int64_t T, int64_t H,
                            int64_t W, int64_t divisor);
