"""nemo_lite_serving: the serving engine; it builds on nemo_lite.generate."""
