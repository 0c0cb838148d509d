"""HTML template of the report: light and dark style, and placeholders for title and body."""

WRITTEN_BY = "Written by qft_hf "  # marks a report, which a later one may replace
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: qft_hf</title>
<style>
:root {{
  color-scheme: light dark;
  --ground: #ffffff; --ink: #1d2329; --faint: #66707a; --rule: #dfe3e8; --panel: #f6f7f9;
  --c0: #1f6fb2; --c1: #c2571a; --c2: #2c8a5b; --c3: #9b4a9b; --c4: #b08a00; --c5: #4a5a6a;
  --k0: #2e86ab; --k1: #7f8fa6; --k2: #c0392b;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --ground: #14181c; --ink: #e6e9ec; --faint: #98a2ad; --rule: #313941; --panel: #1c2227;
    --c0: #6db3ee; --c1: #f0955a; --c2: #66c796; --c3: #cf8ecf; --c4: #e0bf4a; --c5: #a5b4c2;
    --k0: #4fa8cf; --k1: #a4b1c4; --k2: #e0685c;
  }}
}}
body {{ margin: 0 auto; max-width: 1020px; padding: 24px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 22px; margin: 0 0 4px; }}
h2 {{ font-size: 17px; margin: 32px 0 8px; }}
h3 {{ font-size: 15px; margin: 16px 0 4px; }}
p {{ margin: 6px 0; }}
.note, figcaption, footer {{ color: var(--faint); font-size: 13px; }}
figure {{ margin: 0; }}
figcaption {{ text-align: center; }}
h1, h3, figcaption, .name {{ overflow-wrap: anywhere; }}
svg {{ width: 100%; max-width: 540px; height: auto; display: block; }}
svg.wide {{ max-width: 760px; }}
svg text {{ fill: var(--faint); font-size: 12px; }}
.rule {{ stroke: var(--rule); }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; }}
.legend span {{ display: inline-block; max-width: 100%; margin-right: 18px; }}
.scroll .name {{ display: inline-block; width: max-content; max-width: 22em; }}
.swatch {{ display: inline-block; width: 11px; height: 11px; margin-right: 6px;
  border-radius: 2px; background: currentColor; }}
.swatch.dashed {{ background: repeating-linear-gradient(90deg, currentColor 0 4px, #0000 0 7px); }}
.swatch.dotted {{ background: repeating-linear-gradient(90deg, currentColor 0 2px, #0000 0 4px); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 10px; text-align: left; border-bottom: 1px solid var(--rule); }}
th {{ color: var(--faint); font-weight: 500; }}
.heat td {{ padding: 2px; }}
.heat td:first-child {{ padding-right: 10px; white-space: nowrap; }}
.shade {{ display: block; padding: 2px 8px; text-align: right; border-radius: 2px;
  background: color-mix(in srgb, var(--k0) calc(var(--share) * 55%), var(--panel)); }}
polyline {{ fill: none; stroke: currentColor; stroke-width: 1.6; }}
polyline.dashed {{ stroke-dasharray: 6 3; }}
polyline.dotted, circle.dotted {{ stroke-dasharray: 2 2; }}
circle, rect {{ fill: currentColor; }}
circle.dashed, circle.dotted {{ fill: none; stroke: currentColor; }}
rect.arithmetic {{ opacity: 0.45; }}
.kind0 {{ color: var(--k0); }} .kind1 {{ color: var(--k1); }} .kind2 {{ color: var(--k2); }}
.run0 {{ color: var(--c0); }} .run1 {{ color: var(--c1); }} .run2 {{ color: var(--c2); }}
.run3 {{ color: var(--c3); }} .run4 {{ color: var(--c4); }} .run5 {{ color: var(--c5); }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">Runs of <code>qft-hf finetune</code>.</p>
{body}
<footer><p>{written_by}{version}.</p></footer>
</body>
</html>
"""
