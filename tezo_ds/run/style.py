"""The style sheet of a run's page."""

STYLE = """
:root {
  color-scheme: light dark; --ink: #1d2530; --soft: #667085; --line: #e3e6ea; --back: #fff; --box: #f6f7f9;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #98a2b3; --line: #333a45; --back: #14181e; --box: #1d232b }
}
body {
  margin: 0 auto; max-width: 860px; padding: 32px 20px 64px; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--back);
}
h1 { font-size: 24px; margin: 0 } h2 { font-size: 17px; margin: 36px 0 8px }
.sub { color: var(--soft); margin: 2px 0 20px } .bad { color: #c0392b }
.cards { display: flex; flex-wrap: wrap; gap: 12px }
.card { background: var(--box); border-radius: 8px; padding: 10px 16px }
.card b { display: block; font-size: 20px } .card span { color: var(--soft); font-size: 13px }
figure { margin: 16px 0 } figcaption { font-weight: 600; margin-bottom: 4px }
figcaption span { font-weight: 400; font-size: 13px; margin-left: 12px }
svg { width: 100%; height: auto } text { font-size: 12px; fill: var(--soft) }
text.y { text-anchor: end } text.x { text-anchor: middle } .grid { stroke: var(--line) }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round } .faint { opacity: .3; stroke-width: 1 }
.s0 { stroke: #2f6fde } .s1 { stroke: #e07b1a } .s2 { stroke: #27956b }
circle.s0 { fill: #2f6fde } circle.s1 { fill: #e07b1a } circle.s2 { fill: #27956b }
.k0 { color: #2f6fde } .k1 { color: #e07b1a } .k2 { color: #27956b }
table { border-collapse: collapse; width: 100% }
td {
  border-bottom: 1px solid var(--line); padding: 4px 12px 4px 0; vertical-align: top;
  overflow-wrap: anywhere;
}
td:first-child { color: var(--soft); white-space: nowrap; width: 1% }
pre {
  background: var(--box); border-radius: 8px; padding: 10px 14px; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
summary { cursor: pointer; font-weight: 600 }
"""
