"""The shell of a report: style and the few lines of script, both inside the page."""

from __future__ import annotations

import html

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f6f7f9;--ink:#1b1f24;--muted:#5f6875;--line:#dfe3e8;--accent:#1f5fd0;
--accent-soft:#dce8fb;--finished:#7b98c9;--stopped:#b4bac4;--good:#166f41;--good-soft:#ddf3e6;--bad:#c0322a;
--bad-soft:#fbe3e1;--warn:#8a5a00;--warn-soft:#fbeecb}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--panel:#1c2026;--ink:#e5e8ec;--muted:#9aa3af;--line:#30363e;
--accent:#79a7ff;--accent-soft:#22345a;--finished:#5f7db3;--stopped:#59616c;--good:#62d39a;--good-soft:#173b2a;
--bad:#ff8a80;--bad-soft:#4a2320;--warn:#f0c060;--warn-soft:#43341a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Noto Sans","Liberation Sans","Hiragino Sans","Yu Gothic",Meiryo,"Noto Sans CJK JP","Noto Sans JP",
"IPAexGothic",Arial,sans-serif}
main,header,footer{max-width:1160px;margin:0 auto;padding:0 24px}
header{padding-top:44px}
.kicker{color:var(--muted);font-size:.85rem;letter-spacing:.02em;margin:0 0 4px}
h1{font-size:1.9rem;line-height:1.2;margin:0;letter-spacing:-.015em}
h1 .pill{vertical-align:middle;margin-left:.5rem;letter-spacing:0}
.lead{font-size:1.28rem;line-height:1.45;max-width:46rem;margin:14px 0 26px;text-wrap:pretty}
h2{font-size:1.15rem;margin:52px 0 4px;letter-spacing:-.005em}
h3{font-size:.95rem;margin:0 0 6px}
h3.gap{margin-top:30px}
.figures.gap{margin-top:22px}
.note code{overflow-wrap:anywhere}
.note{color:var(--muted);font-size:.9rem;margin:0 0 14px;max-width:46rem}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.9rem;padding:10px 0;
border-bottom:1px solid var(--line);margin-top:8px}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:8px;overflow:hidden;margin:0}
.facts div{background:var(--bg);padding:12px 16px}
.facts dt{color:var(--muted);font-size:.8rem}
.facts dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;letter-spacing:-.01em;
white-space:nowrap}
.facts dd small{display:block;font-size:.8rem;font-weight:400;color:var(--muted);letter-spacing:0;white-space:normal}
.scroll{overflow:auto;width:fit-content;max-width:100%;border:1px solid var(--line);border-radius:8px}
.tall{max-height:37rem}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 11px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child>td,tr:last-child>th[scope=row]{border-bottom:0}
thead th{position:sticky;top:0;background:var(--panel);color:var(--muted);font-weight:500;font-size:.8rem;z-index:2}
th:first-child,td.l,th.l{text-align:left}
tbody th{font-weight:600;position:sticky;left:0;background:var(--bg);z-index:1}
thead th:first-child{left:0;z-index:3}
td.wrap{white-space:normal;min-width:14rem;text-align:left}
tr.win>*{background:var(--accent-soft)}
tr.dim td{color:var(--muted)}
th button{all:unset;cursor:pointer;padding:2px 0}
th button:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:2px}
th button::after{content:"";display:inline-block;width:.9em;text-align:center}
th[aria-sort=ascending] button::after{content:"\\25b4"}
th[aria-sort=descending] button::after{content:"\\25be"}
.pill{display:inline-block;border-radius:99px;padding:1px 9px;font-size:.78rem;font-weight:500;
background:var(--panel);color:var(--muted)}
.pill.good{background:var(--good-soft);color:var(--good)}
.pill.bad{background:var(--bad-soft);color:var(--bad)}
.pill.warn{background:var(--warn-soft);color:var(--warn)}
.pill.win{background:var(--accent);color:var(--bg)}
tbody th small{display:block;font-size:.78rem;font-weight:400;color:var(--muted);white-space:normal;max-width:18rem}
td.note{max-width:none;margin:0;white-space:normal;min-width:16rem;color:var(--muted);font-size:.85rem}
.nb{white-space:nowrap}
.se{color:var(--muted);font-size:.85em}
span.se.below{display:block;line-height:1.3}
.meter{display:inline-block;position:relative;width:60px;height:6px;border-radius:3px;background:var(--line);
margin-right:10px;vertical-align:middle}
.meter b{position:absolute;top:2px;height:2px;background:var(--ink);opacity:.75}
tr.near>th[scope=row]{box-shadow:inset 4px 0 0 var(--accent)}
.pill.near{background:var(--accent-soft);color:var(--ink)}
.meter i{display:block;height:100%;background:var(--finished);border-radius:3px}
.win .meter i{background:var(--accent)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr));gap:18px 26px}
.figures.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr))}
figure{margin:0;min-width:0}
figcaption{font-size:.9rem;font-weight:600;margin-bottom:2px}
figure svg{display:block;width:100%;height:auto;max-width:490px;overflow:visible}
figure svg text{font-family:inherit!important}
figure .trial:hover path{stroke-width:3!important}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.85rem;color:var(--muted);margin:0 0 14px;
padding:0;list-style:none}
.legend i{display:inline-block;width:18px;height:3px;border-radius:2px;vertical-align:middle;margin-right:7px}
.legend i.hollow{width:9px;height:9px;border-radius:9px;border:1.5px solid var(--muted)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px}
.card{border:1px solid var(--line);border-radius:8px;padding:14px;display:grid;
grid-template-columns:104px 1fr;gap:14px;min-width:0}
.card img{width:104px;height:104px;object-fit:contain;border-radius:4px;background:var(--panel)}
.card img.small{image-rendering:pixelated}
.card .id{color:var(--muted);font-size:.72rem;margin-top:6px;overflow-wrap:anywhere;line-height:1.3}
.card dl{margin:0;font-size:.87rem;line-height:1.4;min-width:0}
.card dt{color:var(--muted);font-size:.74rem}
.card dd{margin:0 0 7px;overflow-wrap:anywhere}
.card dd{color:var(--muted)}
.card dd.w,.card dd.r{color:var(--ink)}
.card dt.w{color:var(--accent);font-weight:600}
.card ul{margin:4px 0 0;padding-left:1.1em}
.card details{margin:2px 0 0}
.card summary{font-size:.74rem;padding:0}
.card dd.none{color:var(--muted);font-style:italic}
.stack{display:flex;height:22px;border-radius:6px;overflow:hidden;margin:0 0 14px;gap:2px}
.stack i{display:block;min-width:2px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:26px;align-items:start}
.kv{margin:0;display:grid;grid-template-columns:auto 1fr;gap:4px 18px;font-size:.9rem}
.kv dt{color:var(--muted)}
.kv dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}

pre,code{font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono","Noto Sans Mono CJK JP",monospace}
pre{background:var(--panel);border-radius:8px;padding:12px 16px;overflow-x:auto;margin:0 0 14px}
details{margin-top:14px}
summary{cursor:pointer;color:var(--muted);font-size:.9rem;padding:4px 0}
details[open] summary{margin-bottom:8px}
footer{color:var(--muted);font-size:.85rem;padding-top:40px;padding-bottom:48px}
@media (max-width:640px){main,header,footer{padding-left:16px;
padding-right:16px}header{padding-top:26px}h1{font-size:1.5rem}
.lead{font-size:1.1rem}h2{margin-top:40px}th,td{padding:6px 9px}.facts{grid-template-columns:1fr 1fr}
.facts dd{font-size:1.1rem}.facts div:last-child:nth-child(odd){grid-column:1/-1}
tbody th{white-space:normal;min-width:6rem}tbody th small:not(.keep){display:none}
.meter{width:44px;margin-right:7px}.tall{max-height:30rem}}
@media print{.tall{max-height:none}nav{display:none}.scroll{overflow:visible}.card,figure,tr{break-inside:avoid}}
"""

SCRIPT = """
document.querySelectorAll('table.sortable').forEach(table=>{
  const body=table.tBodies[0];
  table.querySelectorAll('th button').forEach(button=>button.addEventListener('click',()=>{
    const th=button.closest('th'),column=th.cellIndex;
    const first=th.dataset.first||'ascending',other=first==='ascending'?'descending':'ascending';
    const order=th.getAttribute('aria-sort')===first?other:first,sign=order==='ascending'?1:-1;
    table.querySelectorAll('th[aria-sort]').forEach(t=>t.removeAttribute('aria-sort'));
    th.setAttribute('aria-sort',order);
    const value=row=>row.cells[column].dataset.v??row.cells[column].textContent.trim();
    const rows=[...body.rows].map(row=>[value(row),row]);
    rows.sort(([a],[b])=>{
      if(a===''||b==='')return (a==='')-(b==='');
      const x=Number(a),y=Number(b);
      return sign*(Number.isNaN(x)||Number.isNaN(y)?a.localeCompare(b):x-y);
    });
    body.append(...rows.map(([,row])=>row));
  }));
});
"""


def page(title: str, header: str, body: str, footer: str, *, lang: str = "en") -> str:
    """One HTML document that loads nothing; the policy in its head makes a browser hold it to that."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="{html.escape(lang, quote=True)}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>{header}</header>\n<main>\n{body}\n</main>\n<footer>{footer}</footer>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
