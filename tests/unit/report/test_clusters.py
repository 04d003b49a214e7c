"""Which clusters are shown, and how they pass into the next."""

import numpy as np
import pytest

from mcl_clip.report.clusters import BANDS, _flow_figure, _largest, _places, shown_clusters


def test_clusters_are_shown_from_the_largest_to_the_smallest():
    sizes = np.array([5, 0, 100, 7, 60, 1, 30])
    assert shown_clusters(sizes, 3)[0] == 2
    assert shown_clusters(sizes, 3)[-1] == 5
    assert 1 not in shown_clusters(sizes, 100)
    assert len(shown_clusters(sizes, 100)) == 6


@pytest.mark.parametrize("clusters", [1, 3, BANDS, 500])
def test_every_row_has_a_band(clusters):
    assignments = np.arange(2000) % clusters
    kept = _largest(assignments)
    places = _places(assignments, kept)
    assert len(kept) == min(BANDS, clusters)
    assert np.bincount(places, minlength=len(kept) + 1).sum() == 2000
    assert all((assignments[places == place] == cluster).all() for place, cluster in enumerate(kept))
    assert (places == len(kept)).any() == (clusters > BANDS)


def test_names_in_the_flow_can_do_nothing():
    names = [["$x^2$ <b>", ""], ["</svg><script>", "雪", "3 other clusters"]]
    figure = str(_flow_figure(np.array([[3, 0, 2], [0, 0, 0]]), names, (0, 1)))
    assert "<script" not in figure
    assert "$x^2$ &lt;b&gt;" in figure
    assert figure.count("<svg") == figure.count("</svg>") == 1
