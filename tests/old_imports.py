"Run the import lines that users of older versions have: `python tests/old_imports.py`"
import sys
from pathlib import Path

LINES = Path(__file__).resolve().parent/'old_imports.txt'

def read(
    file:Path, # Lines of Python; behind `# ` the names that a line has to give beside those it spells
)->dict:
    "Names by import line"
    lines = [l for l in file.read_text(encoding='utf-8').splitlines() if l and l[0] != '#']
    return {code.strip():names.split() for code,_,names in (l.partition('#') for l in lines)}

def trouble(
    line:str, # One import
    names:list, # That it has to give
)->str:
    "What went wrong with the line in an empty namespace; an empty word if nothing did"
    space = {}
    try: exec(line, space)
    except Exception as e: return f'{type(e).__name__}: {e}'
    lost = [n for n in names if n not in space]
    return f"gives no {', '.join(lost)}"*bool(lost)

def main():
    lines = read(LINES)
    said = {l:trouble(l, names) for l,names in lines.items()}
    failed = {l:t for l,t in said.items() if t}
    for l,t in failed.items(): print(f'FAIL  {l}: {t}')
    print(f'{len(lines)} lines, {sum(map(len, lines.values()))} names, {len(failed)} failed')
    sys.exit(bool(failed or not lines))

if __name__ == '__main__': main()
