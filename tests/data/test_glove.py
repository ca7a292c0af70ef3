import pickle
import warnings

import numpy as np
import pytest

from modeling_diffusionvmr.data.features import open_text_features
from modeling_diffusionvmr.data.glove import GloveFeatures
from small_data import GLOVE

QUERIES = [
    {"qid": 7, "query": "The plum, the  PLUM"},
    {"qid": "b_1", "query": "(bag) bag. -"},
    {"qid": 9, "query": "zyx's ... plum"},
]


KNOWN = QUERIES[:2]


def test_word_vectors(glove):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = open_text_features(glove(), KNOWN)
    assert features[7].dtype == np.float32
    np.testing.assert_array_equal(features[7], [[1, 0], [0.5, -2], [1, 0], [0.5, -2]])
    np.testing.assert_array_equal(features["b_1"], [[3, 4], [7, 7], [8, 9]])  # "bag." is a known word
    np.testing.assert_array_equal(features["7"], features[7])
    assert list(features) == ["7", "b_1"] and len(features) == 2 and 7 in features and "b_1" in features
    assert 9 not in features
    with pytest.raises(KeyError, match=r"glove\.txt: qid 9 is not in the rows"):
        features[9]
    other = pickle.loads(pickle.dumps(features))
    np.testing.assert_array_equal(other[7], features[7])


def test_unknown_words_are_zeros_and_counted(glove):
    with pytest.warns(
        UserWarning, match=r"glove\.txt: 2 of 8 words are unknown and get zeros: \.\.\., zyx's$"
    ) as caught:
        features = GloveFeatures(glove(), QUERIES)
    assert len(caught) == 1
    np.testing.assert_array_equal(features[9], [[0, 0], [0, 0], [0.5, -2]])
    np.testing.assert_array_equal(features["b_1"], [[3, 4], [7, 7], [8, 9]])
    many = [{"qid": 1, "query": "plum " + " ".join(f"w{number:02}" for number in range(30))}]
    with pytest.warns(UserWarning, match=r"30 of 31 words .*: w00, w01, .*, w09, \.\.\.$"):
        assert GloveFeatures(glove(), many)[1].shape == (31, 2)


def test_words_that_have_spaces(glove):
    """As in glove.840B.300d.txt, where some begin like other words."""
    text = ", 5 5\nat 1 2\nat name@domain.com 3 4\n. . . 9 9\nplum 0.5 -2\n"
    features = open_text_features(glove(text), [{"qid": 1, "query": "at plum"}])
    np.testing.assert_array_equal(features[1], [[1, 2], [0.5, -2]])


@pytest.mark.parametrize(
    "text, message",
    [
        (GLOVE + "zyx's 1\n", "line 6: must be a word and 2 numbers"),
        (GLOVE + "zyx's 1 two\n", "line 6: must be a word and 2 numbers"),
        (GLOVE + "zyx's 1 nan\n", "line 6: must be a word and 2 numbers"),
        (GLOVE + "zyx's 1e39 1\n", "line 6: must be a word and 2 numbers"),
        ("the\n" + GLOVE, "line 1: must be a word and its numbers"),
        (b"a 1 2\n\xff\xfe 1 2\n", ""),
        ("", "contains none of the"),
        ("other 1 2\n", "contains none of the"),
    ],
)
def test_rejected_word_vectors(glove, text, message):
    path = glove(text)
    with pytest.raises(ValueError, match=rf"glove\.txt.*{message}"):
        open_text_features(path, QUERIES)


def test_lines_of_other_words_are_not_read(glove):
    assert open_text_features(glove(GLOVE + "other 1\n"), KNOWN)[7].shape == (4, 2)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt: no such file$"):
        open_text_features(glove().with_name("absent.txt"), KNOWN)
