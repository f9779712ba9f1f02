"Package metadata: everything is read from settings.ini, which nbdev shares."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

extras = dict(dev=cfg['dev_requirements'].split(), **{k[6:]:v.split() for k,v in cfg.items() if k.startswith('extra_')})

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
      author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
      long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else '',
      long_description_content_type='text/markdown',
      packages=find_packages(include=['interp_parts', 'interp_parts.*']), include_package_data=True,
      python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
      classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                   'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Image Recognition'],
      entry_points={'console_scripts': cfg['console_scripts'].split(),
                    'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
      zip_safe=False)
