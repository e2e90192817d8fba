"""The look of a report's page, light and dark as the reader's system is."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #1f1f1f; --muted: #5e5e5e; --grid: #e2e2e0; --link: #0b5cad;
  --fall: 213 94 0; --rise: 0 114 178;
  --series-0: #0072b2; --series-1: #c75000; --series-2: #00805d; --series-3: #b0528a; --series-4: #a87200;
  --series-5: #2a86bd;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141517; --card: #1e2023; --ink: #e8e8e6; --muted: #a8a8a4; --grid: #383a3e; --link: #7db8f0;
    --fall: 255 140 60; --rise: 90 175 240;
    --series-0: #56b4e9; --series-1: #ff8c3c; --series-2: #3cc79b; --series-3: #e59ac6; --series-4: #e9b949;
    --series-5: #9fd4f5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere;
}
main { max-width: 1200px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; }
h3 { font-size: 1rem; margin: 0 0 6px; }
p, ul { margin: 0 0 12px; max-width: 82ch; }
a { color: var(--link); }
.muted, figcaption, small { color: var(--muted); }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 16px; margin: 0 0 16px; }
.summary { padding-left: 1.2em; }
.summary li { margin-bottom: 6px; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.charts figure { max-width: 600px; margin: 0; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { font-size: 0.88rem; margin-top: 6px; }
.scroll { overflow-x: auto; margin: 0 0 16px; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--muted); font-weight: 600; }
.tokens {
  font: 0.88rem/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; margin: 0 0 10px;
}
.tokens span { border-radius: 3px; padding: 2px 0; }
.tokens mark { background: none; color: inherit; outline: 2px solid var(--ink); border-radius: 3px; padding: 2px 1px; }
.prompt { color: var(--muted); white-space: pre-wrap; font-size: 0.88rem; margin: 0 0 10px; max-width: none; }
.fall { background: rgb(var(--fall) / var(--a)); }
.rise { background: rgb(var(--rise) / var(--a)); }
.key { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; font-size: 0.88rem; margin-bottom: 12px; }
.key i { display: inline-block; width: 2.2em; height: 1em; border-radius: 3px; }
.key i { vertical-align: -0.1em; margin-right: 6px; }
.key i.edit { outline: 2px solid var(--ink); }
code { font-size: 0.9em; }
math { font-size: 1.05em; }
"""
