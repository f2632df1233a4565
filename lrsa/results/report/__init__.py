"""One self-contained HTML page of a sweep or study: tables, interactive figures, configs, environment, failures.

`page` puts it together; `views` draws what a table and its records have the data for, `charts` places it; `sections`
says what runs were. `page.html`, `page.css` and `page.js` are what the page is made of; nothing is fetched.
"""

from lrsa.results.report.page import build_report
from lrsa.results.report.sections import PlainTable

__all__ = ["PlainTable", "build_report"]
