"""Hook of mkdocs.yml that converts Sphinx's roles in docstrings, which Markdown does not know."""
import re

ROLES = re.compile(r':(?:attr|class|data|func|meth|mod):<code>([^<]*)</code>')


def on_page_content(html: str, **_: object) -> str:
    """Replace ``:class:`~convneur_mm.models.ConvNeur``` by ``ConvNeur`` in the HTML."""
    return ROLES.sub(lambda role: f'<code>{_shown(role[1])}</code>', html)


def _shown(name: str) -> str:
    return name.rpartition('.')[2] if name[0] == '~' else name.lstrip('.')
