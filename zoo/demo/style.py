"""The page's style sheet."""

STYLE = """
:root { --ink: #1c2128; --muted: #57606a; --line: #d8dee4; --paper: #ffffff; --card: #f6f8fa; --accent: #b02a7c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --muted: #9aa5b1; --line: #30363d; --paper: #0d1117; --card: #161b22; --accent: #f472b6; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.15; margin: 0 0 .8rem; letter-spacing: -.02em; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .4rem; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: .9rem 0 .3rem; position: sticky; left: 0; width: fit-content; }
h3 small { font-weight: 400; color: var(--muted); margin-left: .3rem; }
p, li, dd { max-width: 46rem; }
.muted { color: var(--muted); font-size: .92rem; }
code { font-size: .92em; background: var(--card); padding: .05em .3em; border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .8rem; margin: 1.4rem 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.2; color: var(--accent); letter-spacing: -.02em; }
.tile span { color: var(--muted); font-size: .9rem; line-height: 1.4; display: block; }
figure { margin: 0; }
figcaption { color: var(--muted); font-size: .88rem; }
.scroll { overflow-x: auto; }
.strip { display: grid; grid-template-columns: repeat(8, minmax(112px, 1fr)); gap: 4px; min-width: 924px; }
.cell { position: relative; line-height: 0; }
.cell img { width: 100%; border-radius: 3px; }
.sheet { width: 100%; min-width: 528px; image-rendering: pixelated; border-radius: 3px; }
.ring { position: absolute; width: 15px; height: 15px; margin: -7.5px 0 0 -7.5px; border: 2px solid #22d3ee;
  border-radius: 50%; }
.strips figcaption { margin-top: .7rem; }
.scale { display: inline-block; width: 90px; height: .7em; border-radius: 3px; margin-right: .3rem;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1.4rem;
  align-items: start; margin-top: .8rem; }
.pair svg { width: 100%; height: auto; display: block; }
.pair figcaption { font-weight: 600; color: var(--ink); margin-bottom: .2rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .92rem; margin-top: .6rem; }
.legend i { display: inline-block; width: 1.1em; height: .32em; border-radius: 2px; margin-right: .45em;
  vertical-align: .22em; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .5rem; line-height: 1.4; }
th, td { text-align: right; padding: .35rem .55rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
th:first-child { text-align: left; min-width: 7.5rem; }
.numbers { margin-top: 1.1rem; min-width: 820px; }
.numbers td b { display: block; font-weight: 600; }
.numbers small { display: block; color: var(--muted); white-space: nowrap; font-size: .78rem; }
dl { margin: .6rem 0 0; }
dt { font-weight: 600; margin-top: .8rem; }
dd { margin: 0; color: var(--muted); font-size: .95rem; }
"""
