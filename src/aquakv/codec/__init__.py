"""The codec: four independent stages, one codec per layer, one container per model, one file."""

from aquakv.codec.fingerprint import ModelFingerprint
from aquakv.codec.layer import EncodedTokens, LayerCodec, Reconstruction, TensorCodec
from aquakv.codec.model import ModelCodec
from aquakv.codec.predictor import AffinePredictor
from aquakv.codec.quantizer import EncodedVectors, GridQuantizer
from aquakv.codec.transform import GroupTransform

__all__ = [
    "AffinePredictor",
    "EncodedTokens",
    "EncodedVectors",
    "GridQuantizer",
    "GroupTransform",
    "LayerCodec",
    "ModelCodec",
    "ModelFingerprint",
    "Reconstruction",
    "TensorCodec",
]
