import dataclasses

import pytest

from tests.trainer.trainings import make_loader
from trainer.results import views


@pytest.mark.parametrize(("kept", "shown"), [(None, views.VIEWS), (1, 0), (2, 1), (3, 2)])
def test_the_page_shows_views_that_were_trained_on(pictures, kept, shown):
    """Of a fixed number the first is the plain one, which it shows anyway."""
    loader = dataclasses.replace(make_loader(pictures), views=kept)
    made = views.views(loader, solved=False)
    assert made and {len(each.seen) for each in made} == {shown}
