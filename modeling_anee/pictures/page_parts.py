"""Style and script of the page of one generation."""

from ..actions import ActionTable


STEPS = 12  # of the colour scale
# Ends and middle of the scale, and the ink on it; every step keeps a contrast of 4.5 with the ink.
LIGHT_SCALE, LIGHT_INK = ("#fff8e1", "#a8dcc4", "#7fb2ee"), "#16202a"
DARK_SCALE, DARK_INK = ("#4a3d12", "#1a5c48", "#2a5db0"), "#f3f5f7"
DARK_EXIT, DARK_EXIT_INK = "#3a4048", "#b9c0c8"


def ramp(ends: tuple[str, str, str]) -> list[str]:
    """`STEPS` colours from the first through the second to the third."""
    low, middle, high = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in ends)
    colours = []
    for step in range(STEPS):
        place = 2 * step / (STEPS - 1)
        one, two, share = (low, middle, place) if place <= 1 else (middle, high, place - 1)
        colours.append("#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(one, two, strict=True)))
    return colours


def _steps(ends: tuple[str, str, str]) -> str:
    return "".join(f".s{i}{{background:{colour}}}" for i, colour in enumerate(ramp(ends)))


def style(table: ActionTable) -> str:
    """The style sheet; a cell's class is `a` and the place of its action."""
    cells = "".join(f".a{place}{{background:{a.colour};color:{a.ink}}}" for place, a in enumerate(table))
    left = ",".join(f".a{place}" for place, a in enumerate(table) if a.leaves)
    dark = f"{left}{{background:{DARK_EXIT};color:{DARK_EXIT_INK}}}" if left else ""
    return f"{_PLAIN}{cells}{_steps(LIGHT_SCALE)}@media (prefers-color-scheme:dark){{{_DARK}{dark}{_steps(DARK_SCALE)}}}"


_PLAIN = """
:root{--ink:#16202a;--soft:#55606b;--back:#ffffff;--panel:#f4f6f8;--line:#d5dbe1;--mark:#c1440e}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main,noscript p{max-width:62rem;margin:0 auto;padding:0 1.25rem}
main{padding-bottom:13rem}
h1{font-size:1.35rem;margin:1.25rem 0 .75rem}
h2{font-size:.95rem;margin:0 0 .4rem}
h2 small{color:var(--soft);font-weight:400;margin-left:.4em}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.5rem 1.5rem;margin:0}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;overflow-wrap:anywhere}
.legend{border-top:1px solid var(--line);margin-top:.9rem;padding-top:.7rem;font-size:.85rem}
.scale{display:flex;align-items:center;gap:.6em}
.ramp{display:flex}.ramp span{width:1.1rem;height:1rem}
.legend ul{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;list-style:none;margin:.6rem 0 0;padding:0}
section{margin-top:1.4rem;padding:.8rem 1rem;border:1px solid var(--line);border-left-width:4px;border-radius:4px}
section.prompt{border-left-color:var(--soft)}
section.new{border-left-color:var(--mark)}
.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;font-size:1.02rem}
.t{color:var(--ink);border-radius:3px;padding:.12em 0;box-shadow:inset -1px 0 var(--back);cursor:default}
.t.none{outline:1px dashed var(--soft);outline-offset:-1px}
.t.on{outline:2px solid var(--mark);outline-offset:0}
.t:focus-visible{outline:3px solid var(--mark);outline-offset:1px}
.sign{font-style:normal;opacity:.75;font-size:.85em;user-select:none}
aside{position:fixed;left:0;right:0;bottom:0;padding:.7rem 1.25rem .9rem;background:var(--panel);
border-top:1px solid var(--line)}
aside .what{margin:0 auto .5rem;max-width:59.5rem}
.what code{font:.95em ui-monospace,Menlo,Consolas,monospace;background:var(--back);border:1px solid var(--line);
border-radius:3px;padding:.05em .35em;white-space:pre-wrap}
.strip{display:flex;max-width:59.5rem;margin:0 auto;gap:2px}
.layer{flex:1 1 0;min-width:0;text-align:center;font-size:.68rem;color:var(--soft)}
.cell{display:inline-block;width:1.35em;text-align:center;border-radius:2px;font-weight:600;font-size:.8rem;line-height:1.5}
.layer .cell{display:block;width:auto;line-height:1.9}
@media (max-width:40rem){.strip{flex-wrap:wrap}.layer{flex:0 0 calc(10% - 2px)}main{padding-bottom:19rem}}
"""
_DARK = f":root{{--ink:{DARK_INK};--soft:#a9b4bf;--back:#14181c;--panel:#1d2329;--line:#39424b;--mark:#ff9b66}}"

# What the actions are is read from the legend.
SCRIPT = r"""'use strict';
const ACTIONS={};document.querySelectorAll('.legend li').forEach(e=>{ACTIONS[e.dataset.letter]=e.dataset});
const tokens=[...document.querySelectorAll('.t')],what=document.querySelector('.what'),strip=document.querySelector('.strip');
let chosen=null;
function make(tag,name,text){const e=document.createElement(tag);e.className=name;e.textContent=text;return e}
function told(token){
  const text=[...token.childNodes].map(n=>n.nodeType===3?n.data.replace(/ /g,'␣').replace(/[\n\t]/g,''):n.textContent).join('');
  const number=`token ${Number(token.dataset.n)+1} `;
  if(!token.dataset.a)return [number,text,' was not run: it is the last one, and nothing came after it.'];
  const ran=[...token.dataset.a].filter(a=>ACTIONS[a].ran==='1').length;
  return [number,text,` cost ${token.dataset.c} of the whole model, ${ran} of ${token.dataset.a.length} layers ran`];
}
function show(token){
  if(chosen){chosen.classList.remove('on');chosen.tabIndex=-1;chosen.removeAttribute('aria-selected')}
  chosen=token;token.classList.add('on');token.tabIndex=0;token.setAttribute('aria-selected','true');
  const [number,text,rest]=told(token);
  what.replaceChildren(number,make('code','',text),rest);
  const actions=[...(token.dataset.a||'')];
  strip.replaceChildren(...actions.map((a,i)=>{
    const box=make('div','layer','');box.title=`layer ${i}: ${ACTIONS[a].name}`;
    box.append(make('span','cell a'+ACTIONS[a].place,a),String(i));return box}));
  strip.setAttribute('aria-label',actions.map((a,i)=>`layer ${i} ${ACTIONS[a].name}`).join(', ')||'not run');
}
if(tokens.length)tokens[0].tabIndex=0;
for(const kind of ['pointerover','focusin','click'])document.querySelector('main').addEventListener(kind,event=>{
  const token=event.target.closest('.t');if(token)show(token)});
const STEP={ArrowRight:1,ArrowLeft:-1};
document.querySelector('main').addEventListener('keydown',event=>{
  let next=tokens.indexOf(document.activeElement);
  if(event.key in STEP)next+=STEP[event.key];
  else if(event.key==='Home')next=0;else if(event.key==='End')next=tokens.length-1;else return;
  event.preventDefault();tokens[Math.min(Math.max(next,0),tokens.length-1)].focus();
});
"""
