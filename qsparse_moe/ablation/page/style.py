"""The style of a page: light or dark as the reader's system is, readable on a narrow screen and on paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee6; --paper: #ffffff; --back: #f5f7fa;
  --link: #1257a8; --code: #eef2f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ef; --soft: #a0abba; --line: #343d4a; --paper: #1a2029; --back: #12161c; --link: #85b8f5;
    --code: #232b36; }
  figure img { filter: brightness(0.92); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 0.6rem; }
a { color: var(--link); }
p { max-width: 68rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
header dl { display: flex; flex-wrap: wrap; gap: 0.4rem 2rem; margin: 0; }
header dt, caption, figcaption { color: var(--soft); font-size: 0.85rem; }
header dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; padding: 0; margin: 1rem 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.25rem;
  margin: 1rem 0; }
.wide { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.25rem 0; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { vertical-align: bottom; }
tbody th { font-weight: 500; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; min-width: 34rem; height: auto; padding: 0.5rem;
  background: #ffffff; border-radius: 6px; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; color: var(--link); font-size: 0.9rem; }
.command p { margin: 0.8rem 0 0.2rem; }
pre { margin: 0; padding: 0.6rem 0.8rem; background: var(--code); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; user-select: all; }
@media print { body { background: none; } section { border: none; padding: 0; } nav { display: none; } }
"""
