"""Networks for detection and instance segmentation."""
