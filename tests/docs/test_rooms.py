"""docs/rooms.svg: the map is the one that its script draws, of files that exist."""

import re
from xml.etree import ElementTree

from docs import rooms
from tests.support import ROOT

MAP = (ROOT / "docs" / "rooms.svg").read_text()


def test_map_in_docs_is_what_the_script_prints(capsys):
    rooms.main()
    assert capsys.readouterr().out == MAP


def test_map_names_and_links_files_that_exist():
    links = re.findall(r'<a href="\.\./([^"]+)">', MAP)
    named = re.findall(r">([\w/]+\.py)<", MAP)
    assert links == named and len(links) == len(rooms.DOORS) + len(rooms.STEPS)
    assert all((ROOT / file).is_file() for file in links)


def test_map_is_well_formed_and_shows_every_room():
    texts = [text.text for text in ElementTree.fromstring(MAP).iter("{http://www.w3.org/2000/svg}text")]
    assert {f"{room}/" for room in rooms.ROOMS} <= set(texts)
