"""Digests are of content: of what was written down before, and of nothing else."""

import hashlib

import ml_dtypes
import numpy as np

from lqec_jax.core.hashing import hash_arrays, hash_parts


def test_parts_are_hashed_as_one_run_of_bytes():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    wanted = hashlib.sha256(b"a\xc3\xa9" + b"xy" + array.tobytes()).hexdigest()
    assert hash_parts(["aé", b"xy", array]) == wanted
    assert hash_parts([]) == hashlib.sha256().hexdigest()


def test_a_view_is_hashed_by_its_values():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert hash_parts([array.T]) == hash_parts([array.T.copy()]) != hash_parts([array])


def test_arrays_are_named_with_dtype_and_shape():
    scale = np.ones((2, 1), ml_dtypes.bfloat16)
    zero = np.zeros((), np.uint8)
    wanted = b"norm.scale bfloat16 (2, 1)\n" + scale.tobytes() + b"zero uint8 (1,)\n\x00"
    found = hash_arrays([("norm.scale", scale), ("zero", zero)])
    assert found == hashlib.sha256(wanted).hexdigest()
    assert found != hash_arrays([("zero", zero), ("norm.scale", scale)])
    assert found != hash_arrays([("norm.scale", scale.reshape(1, 2)), ("zero", zero)])
