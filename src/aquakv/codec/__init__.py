"""The codec: four independent stages, one codec per layer, one container per model, one file."""

from aquakv.codec.encoded import EncodedPages, EncodedStreams, EncodedTokens, EncodedVectors
from aquakv.codec.entropy import EntropyModel, EntropyQuantizer
from aquakv.codec.fingerprint import ModelFingerprint
from aquakv.codec.guard import OutlierGuard
from aquakv.codec.layer import History, LayerCodec, Reconstruction, TensorCodec
from aquakv.codec.model import ModelCodec
from aquakv.codec.predictor import AffinePredictor
from aquakv.codec.quantizer import GridQuantizer
from aquakv.codec.scalar import ScalarQuantizer
from aquakv.codec.transform import GroupTransform, LinearTransform

__all__ = [
    "AffinePredictor",
    "EncodedPages",
    "EncodedStreams",
    "EncodedTokens",
    "EncodedVectors",
    "EntropyModel",
    "EntropyQuantizer",
    "GridQuantizer",
    "GroupTransform",
    "History",
    "LayerCodec",
    "LinearTransform",
    "ModelCodec",
    "ModelFingerprint",
    "OutlierGuard",
    "Reconstruction",
    "ScalarQuantizer",
    "TensorCodec",
]
