/** Every block in model order with the sign of its home; while the model answers, its times below. */

import { h, setText } from '../../dom'
import type { Translate } from '../../i18n'
import { formatSeconds } from '../../units'
import type { BlockState } from '../../wire'
import type { Scene } from './cells'
import { signOf, stripColumns, tickOf } from './facts'
import { BlockList } from './list'
import type { Times } from './words'

const NARROW_COLUMNS = 33
/** What a sweep's times are made of, from the bottom of a bar to its top. */
const TIME_KINDS = ['compute', 'copy', 'wait'] as const

export class Strip {
  readonly element: HTMLElement
  readonly list: BlockList
  private readonly totals = h('div', { class: 'totals small num' })
  private readonly meters: HTMLElement[] = []
  private times: Times[] = []
  private labels: string[] = []

  constructor(private readonly t: Translate) {
    this.list = new BlockList(t, t('mapStrip'), cell => makeColumn(cell))
    this.totals.hidden = true
    this.element = h(
      'div', { class: 'strip' },
      h('div', { class: 'muted small', 'aria-hidden': 'true' }, t('mapStrip')), this.list.element, this.totals,
    )
  }

  show(scene: Scene): void {
    const { blocks } = scene.plan
    this.list.element.style.setProperty('--columns', String(stripColumns(blocks.length)))
    this.list.element.style.setProperty('--narrow', String(stripColumns(blocks.length, NARROW_COLUMNS)))
    this.list.show(scene, blocks, block => signOf(scene.plan, block))
    this.dress(blocks)
  }

  timesOf(label: string): Times | undefined {
    return this.times[this.labels.indexOf(label)]
  }

  /** Draw the newest sweep; bars are as high as their share of the slowest block. */
  live(times: Times[]): void {
    this.times = times
    const slowest = Math.max(...times.map(sum), 1e-9)
    this.meters.forEach((meter, i) => {
      const [wait, copy, compute] = times[i] ?? [0, 0, 0]
      const parts = meter.children
      ;[compute, copy, wait].forEach((seconds, k) => setHeight(parts[k], seconds / slowest))
    })
    this.element.classList.add('is-live')
    this.totals.hidden = false
    setText(this.totals, this.totalWords())
  }

  /** Nothing is generated any more, and what was is not true any more. */
  clear(): void {
    this.times = []
    this.element.classList.remove('is-live')
    this.totals.hidden = true
  }

  private totalWords(): string {
    const total = (k: 0 | 1 | 2) => formatSeconds(this.times.reduce((all, times) => all + times[k], 0))
    return this.t('mapTotals', { wait: total(0), copy: total(1), compute: total(2) })
  }

  /** Ticks and meters of columns that are new. */
  private dress(blocks: BlockState[]): void {
    this.labels = blocks.map(block => block.label)
    this.meters.length = 0
    for (const block of blocks) {
      const column = this.list.cell(block.label)?.parentElement
      const [, tick, meter] = column?.children ?? []
      if (tick) setText(tick, tickOf(block))
      if (meter instanceof HTMLElement) this.meters.push(meter)
    }
  }
}

function makeColumn(cell: HTMLElement): HTMLElement {
  const bars = TIME_KINDS.map(kind => h('i', { class: `time-${kind}` }))
  const meter = h('div', { class: 'meter', 'aria-hidden': 'true' }, ...bars)
  const tick = h('div', { class: 'tick muted', 'aria-hidden': 'true' })
  return h('div', { class: 'column', role: 'presentation' }, cell, tick, meter)
}

function sum([wait, copy, compute]: Times): number {
  return wait + copy + compute
}

function setHeight(element: Element | undefined, part: number): void {
  if (element instanceof HTMLElement) element.style.height = `${(100 * part).toFixed(1)}%`
}
