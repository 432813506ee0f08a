import pytest

from effvit.data.preparing.progress import image_bar


def test_a_bar_ends_full_although_the_last_images_were_not_reported(capsys):
    with image_bar("photos", total=50_000) as reach:
        reach(49_984)
    assert "50000/50000" in capsys.readouterr().err


def test_a_bar_of_a_stopped_run_shows_how_far_it_came(capsys):
    with pytest.raises(RuntimeError), image_bar("photos", total=50_000, already=100) as reach:
        reach(884)
        raise RuntimeError
    shown = capsys.readouterr().err
    assert "100 images are there" in shown and "984/50000" in shown
