# SPDX-License-Identifier: Apache-2.0
"""The user's own folder; what refuses a place that others could meddle with is tested by who meets there."""

import os

import pytest

from weights_core import place


def test_the_users_own_folder_is_their_sessions_or_in_tmp(tmp_path):
    uid = os.geteuid()
    theirs = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert place.default_folder(theirs, uid, "meet") == f"{tmp_path}/meet"
    for wrong in ({}, {"XDG_RUNTIME_DIR": "relative"}, {"XDG_RUNTIME_DIR": str(tmp_path / "gone")}):
        assert place.default_folder(wrong, uid, "meet") == f"/tmp/meet-{uid}"
    assert place.default_folder(theirs, uid + 1, "meet") == f"/tmp/meet-{uid + 1}"


@pytest.mark.parametrize(("mode", "who"), [(0o777, "written"), (0o770, "written"), (0o755, "entered")])
def test_a_folder_that_others_could_use_is_refused(tmp_path, mode, who):
    tmp_path.chmod(mode)
    with pytest.raises(place.PlaceError, match=f"can be {who} by others"):
        place.open_folder(str(tmp_path), owners={os.geteuid()}, private=True)


def test_a_strangers_folder_and_a_link_are_refused(tmp_path):
    with pytest.raises(place.PlaceError, match="belongs to user"):
        place.open_folder(str(tmp_path), owners={os.geteuid() + 1})
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(place.PlaceError, match="is a link"):
        place.open_folder(str(tmp_path / "link"), owners={os.geteuid()})
