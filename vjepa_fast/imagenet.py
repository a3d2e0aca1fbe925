"""Means and standard deviations of ImageNet, per colour channel of values in [0, 1], as V-JEPA normalises clips."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
