"""Every picture of the pages is what its name says, and a browser draws it."""

import re
from xml.etree import ElementTree

from PIL import Image

from tests import browser
from tests.docs import pages

SUFFIXES = (".svg", ".png", ".jpg", ".gif")


def shown():
    """Pictures in docs/, and those that a page shows from elsewhere in the repository."""
    found = {p for p in (pages.ROOT / "docs").rglob("*") if p.suffix in SUFFIXES}
    for page in pages.PAGES:
        found |= {(page.parent / link).resolve() for _, link in pages.links(page) if link.endswith(SUFFIXES)}
    return sorted(found)


def fault(path):
    """What is wrong with a picture; empty where nothing is."""
    try:
        if path.suffix == ".svg":
            root = ElementTree.parse(path).getroot()
            return "" if root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox") else f"a {root.tag}"
        with Image.open(path) as image:
            image.verify()
            return "" if image.format == {".jpg": "JPEG"}.get(path.suffix, path.suffix[1:].upper()) else image.format
    except (OSError, SyntaxError) as error:
        return str(error)


def not_drawn(paths, folder):
    """Names of those pictures that a browser cannot draw."""
    images = "".join(f'<img src="{p.as_uri()}" alt="{p.name}">' for p in paths)
    script = "onload = () => { document.body.textContent = 'not drawn: ' + "
    script += "[...document.images].filter(i => !i.naturalWidth).map(i => i.alt).join(' ') + '.' }"
    page = folder / "page.html"
    page.write_text(f"<body>{images}<script>{script}</script></body>")
    said, _ = browser.browse(page.as_uri(), "--dump-dom", folder=folder)
    return re.search(r"not drawn: (.*)\.", said)[1].split()


def test_pictures_are_what_their_names_say():
    assert len(shown()) > 8
    assert {p.name: found for p in shown() if (found := fault(p))} == {}


def test_a_picture_that_is_none_is_seen(tmp_path):
    uri, wrong, html = (tmp_path / name for name in ("uri.svg", "wrong.png", "page.svg"))
    uri.write_text("data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=")  # what two pages once had
    wrong.write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    html.write_text("<html></html>")
    assert all(map(fault, (uri, wrong, html)))
    if not browser.fault():
        assert not_drawn([uri, wrong, html], tmp_path) == ["uri.svg", "wrong.png", "page.svg"]


def test_a_browser_draws_them(tmp_path):
    browser.needed()
    assert not_drawn(shown(), tmp_path) == []
