"""How engines of TensorRT and TensorRT-RTX are built and run.

All but `build` and `runner` also run under another interpreter, which has TensorRT but perhaps no enginesmith: those
import nothing of enginesmith but each other, and must keep working on Python 3.8.
"""
