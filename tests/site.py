"""What mkdocs is told beyond mkdocs.yml: pages that lie elsewhere, and links that leave docs/.

README, CONTRIBUTING and their like become pages of the site. A link to another file of the
repository, which the site doesn't hold, becomes that file's name.
"""

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PROJECT = Path(__file__).parents[1]
# The site's page of each file that lies beside docs/.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
}
# What somebody who writes code with or for the project calls or extends.
MODULES = {
    "trainer.settings.compose": "from words to settings",
    "trainer.training.training": "the object that is a training",
    "trainer.training.loop": "the loop",
    "trainer.images.decode": "the one preprocessing",
    "launch.targets.base": "what a target is",
    "serving.handler": "what answers a request",
    "serving.contract": "what a request may say",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the decisions, the newest first: their names begin with their dates."""
    decisions = sorted((PROJECT / "docs/decisions").glob("*.md"), reverse=True)
    for entry in config.nav or []:
        if "Decisions" in entry:
            entry["Decisions"] = [f"decisions/{path.name}" for path in decisions]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that don't lie in docs/."""
    for name, page in PAGES.items():
        text = (PROJECT / name).read_text()
        files.append(File.generated(config, page, content=with_links_of_the_site(text, "")))
    api = ["# Python", "", "From the docstrings. Everything else is `python -m ... --help`."]
    for module, what in MODULES.items():
        api += ["", f"## {module}: {what}", "", f"::: {module}", "    options:"]
        api += ["      show_root_heading: false", "      heading_level: 3"]
    files.append(File.generated(config, "api.md", content="\n".join(api) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page of docs/ with links that lead somewhere on the site."""
    if page.file.src_uri in (*PAGES.values(), "api.md"):
        return markdown
    folder = page.file.src_uri.rpartition("/")[0]
    return with_links_of_the_site(markdown, f"docs/{folder}".rstrip("/"))


def with_links_of_the_site(text: str, folder: str) -> str:
    """Return a page's text with its links made those of the site.

    folder: where the page lies in the repository; a link is relative to it.
    """
    depth = folder.count("/") if folder else 0
    up = "../" * depth

    def replaced(found: re.Match[str]) -> str:
        image, label, link = found.groups()
        if link.startswith(("http", "mailto:", "#")):
            return found[0]
        path, hash_, anchor = link.partition("#")
        target = normpath(f"{folder}/{path}" if folder else path)
        if target in PAGES:
            return f"{image}[{label}]({up}{PAGES[target]}{hash_}{anchor})"
        if target == "docs/decisions":
            newest = max((PROJECT / target).glob("*.md")).name
            return f"[{label}]({up}decisions/{newest})"
        if target.startswith("docs/"):
            return f"{image}[{label}]({up}{target.removeprefix('docs/')}{hash_}{anchor})"
        name = label.strip("`")
        return label if name == target else f"{label}, `{target}`"

    return LINK.sub(replaced, text)
